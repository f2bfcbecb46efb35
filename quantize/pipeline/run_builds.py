"""Builds of one source and importance under way together: units in step, each into its own file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...formats.errors import MqError, OutputError
from ..calibrate.folder import discard_folder
from .encoding import Encoded, in_step
from .turns import LayersInTurn
from .work_units import WorkUnit
from .worker_pool import Workers, run_steps

if TYPE_CHECKING:
    from ..calibrate.on_the_fly import GatheredImportance
    from .build import Build, BuildResult, RunOptions


def run_builds(
    builds: Mapping[int, Build],
    moments: Path,
    options: RunOptions,
    on_error: Callable[[int, MqError], None] | None = None,
) -> dict[int, BuildResult]:
    """Encode what is left of builds of one source and importance in step, and give each complete file its name.

    `moments` is the folder of the calibration that they gather, if they do. An error of one build alone goes to
    `on_error`, with the number of the build, and the others go on; without it the error is raised. Raises what concerns
    all of them.
    """
    gone: set[int] = set()
    gathered = next(iter(builds.values())).spec.gathered

    @contextmanager
    def alone(n: int) -> Iterator[None]:
        """A block that concerns one build."""
        try:
            yield
        except MqError as e:
            if on_error is None:
                raise
            gone.add(n)
            on_error(n, e)

    def sync() -> None:
        for n in builds.keys() - gone:
            with alone(n):
                builds[n].sync()

    def deliver(n: int, unit: WorkUnit, done: Encoded | MqError) -> None:
        with alone(n):
            if isinstance(done, MqError):
                raise done
            builds[n].deliver(unit, done)

    with gathering(gathered, moments, builds.values(), options):
        todo: dict[int, list[WorkUnit]] = {}
        for n, build in builds.items():
            with alone(n):
                todo[n] = build.prepare()
        total = sum(unit.weights for n in todo for unit in builds[n].order)
        left = sum(unit.weights for units in todo.values() for unit in units)
        options.watch.begin("encoding", total, "weights", total - left)
        if options.cluster is not None:
            for n in todo:
                with alone(n):
                    builds[n].encode_on(options.cluster)
        else:
            steps = in_step(next(iter(builds.values())).order, todo)
            tuned = any(build.spec.tuning is not None for build in builds.values())
            turns = LayersInTurn(gathered, not tuned, sync, options.watch) if gathered else None
            workers = Workers(options.jobs, options.encoder, options.on_begin, turns)
            run_steps({n: build.spec for n, build in builds.items()}, steps, deliver, workers, gone)
        results: dict[int, BuildResult] = {}
        for n, build in builds.items():
            if n not in gone:
                with alone(n):
                    results[n] = build.finish()
        return results


@contextmanager
def gathering(
    gathered: GatheredImportance | None, folder: Path, builds: Collection[Build], options: RunOptions
) -> Iterator[None]:
    """A block in which the calibration that builds gather, if they do, is open in a folder.

    The folder stays for the next run where one of the builds is to be continued. What errors behind layers cost stays
    besides where no build has begun yet: it is found before.
    """
    sensitive = gathered is not None and gathered.sensitive
    if all(build.begun_anew for build in builds):
        discard_folder(folder, but_sensitivities=sensitive and not options.restart)
    ended = False
    try:
        if gathered is not None:
            build = next(iter(builds))
            gathered.open(folder, build.first_layer, build.last_layer, options.watch)
        yield
        ended = True
    finally:
        if gathered is not None:
            gathered.close()
        if all(build.is_over for build in builds):
            with suppress(OutputError):  # what stays there does no harm, and the files may be finished
                discard_folder(folder, but_sensitivities=sensitive and not ended)
