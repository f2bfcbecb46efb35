"""A build under way: units are encoded, written at their offsets, noted, and the complete file gets its name.

A build is resumable after any interruption, and its bytes are the same for any number of jobs. Hashes follow in file
order while the work goes on, so that nothing large is left to do at the end.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...formats.errors import OutputError, RecipeError
from ...formats.hfq import layout
from ...formats.machine import peak_rss
from ...formats.watch import UNWATCHED, Watch
from ..encode.encoders import CPU, Encoder
from ..spec.hooks import nothing
from ..spec.metadata import Outcome, complete
from ..spec.places import local_folder
from ..spec.plan import engine_warnings
from ..spec.recipe import Recipe
from ..write.inputs import check_no_input
from ..write.partial_file import CALIBRATION, TUNING, Destination, PartialFile, beside
from ..write.stream_folder import StreamFolder
from .build_spec import UNCHANGED, BuildSpec, RecipeChanges, open_builds, output_name
from .encoding import Encoded
from .notes import Notes, with_notes
from .parts import LayerRange, PartLayout, sealed
from .run_builds import run_builds
from .statistics import OnTheFly, Statistics, input_paths
from .work_units import WorkUnit, whole_layers, work_order
from .worker_pool import UnitHook

if TYPE_CHECKING:
    from .cluster.driver import Cluster
    from .tuned_layers import TunedLayers


@dataclass(frozen=True)
class RunOptions:
    """How a spec is built; nothing here changes a byte of the file.

    `shard_cache` is the most shards of a hub source on the disk at once (default: 2, and 4 where the build calibrates
    itself). A `cluster` encodes instead of this process, and does not call `on_begin`. Hooks watch the build, and end
    it where they raise; it can be continued then:

    - `accept(spec)` is called before anything is written, and may refuse what was resolved;
    - `on_note(sentence)` hears what the source has to say, before the work;
    - `watch` each phase of the build, in which it counts bytes that are hashed and weights that are encoded;
    - `on_begin(unit)` is called on the worker's thread before a unit is encoded;
    - `on_done(unit)` once the unit's bytes and its journal line stand.

    All but `on_begin` and `watch` run on the calling thread.
    """

    output: Path | None = None
    jobs: int = 1
    encoder: Encoder = CPU
    force: bool = False
    restart: bool = False
    shard_cache: int | None = None
    cluster: Cluster | None = None
    accept: Callable[[BuildSpec], None] = nothing
    on_note: Callable[[str], None] = nothing
    watch: Watch = UNWATCHED
    on_begin: UnitHook = nothing
    on_done: UnitHook = nothing

    def destination(self, default_name: str, extra_bytes: int = 0) -> Destination:
        """Where the file is to stand; `extra_bytes` is the disk that is taken besides."""
        return Destination(self.output or Path(default_name), self.force, extra_bytes)

    def check(self, default_name: str, total_bytes: int, extra_bytes: int) -> None:
        """Refuse an output that exists, does not fit, or is being written; OutputError. Touches nothing."""
        destination = self.destination(default_name, extra_bytes)
        destination.check(total_bytes)
        destination.check_unused()


@dataclass(frozen=True)
class BuildResult:
    """A finished build. `resumed_units` of its `units` are those of an earlier run; speeds are this run's.

    `coverage` is the share of experts that the statistics saw, None without statistics; `fallbacks` are sentences, and
    `engine` says in sentences what the engine does with such a file that its user should know.
    """

    path: Path
    total_bytes: int
    tensor_count: int
    quantization_hash: str
    seconds: float
    weights_per_second: int
    peak_rss_bytes: int
    coverage: float | None
    fallbacks: tuple[str, ...]
    engine: tuple[str, ...]
    fit: str
    device: str
    units: int
    resumed_units: int

    def as_json(self) -> dict[str, Any]:
        """What `build --json` prints."""
        return {
            **asdict(self),
            "path": str(self.path),
            "fallbacks": list(self.fallbacks),
            "engine": list(self.engine),
        }


class Build:
    """One build under way: a context manager that holds the output's lock, its journal and the unfinished file.

    Entering raises OutputError where the output exists, does not fit or is being written, and ResumeError where an
    unfinished build there is of another spec. Where its spec gathers a calibration, its holder has that open meanwhile.
    """

    def __init__(self, spec: BuildSpec, options: RunOptions, part: LayerRange | None = None) -> None:
        self.spec, self.options = spec, options
        self.order = work_order(spec)
        self._part = None if part is None else PartLayout.of(spec, self.order, part)
        if self._part is not None:
            self.order = self._part.units
        self._tuned: TunedLayers | None = None
        self._streams: StreamFolder | None = None
        self._kept: frozenset[str] = frozenset()
        self._began = time.monotonic()

    def __enter__(self) -> Build:
        spec, part = self.spec, self._part
        self.options.accept(spec)
        name = default_name(spec.recipe, part.layers if part else None)
        destination = self.options.destination(name, spec.disk_bytes())
        signature = spec.signature if part is None else {**spec.signature, "layers": str(part.layers)}
        self._file = PartialFile(destination, part or spec.plan, self.order, signature, self.options.restart)
        try:
            if spec.tuning is not None:
                hint = "give --restart to discard it and begin anew"
                self._streams = StreamFolder(beside(destination.path, TUNING), self.begun_anew, hint)
        except BaseException:
            self._file.close()
            raise
        return self

    @property
    def first_layer(self) -> int:
        """The first layer that this process runs the model through: none of them where a cluster does."""
        if self.options.cluster is not None:
            return self.spec.plan.config.num_hidden_layers
        return self._part.layers.first if self._part else 0

    @property
    def last_layer(self) -> int:
        """The last layer that is encoded."""
        return self._part.layers.last if self._part else self.spec.plan.config.num_hidden_layers - 1

    def __exit__(self, *_: object) -> None:
        """Let go of everything; where nothing is to be continued, nothing stays beside the output."""
        try:
            if self.is_over and self._streams is not None:
                with suppress(OutputError):  # what stays there does no harm, and the file may be finished
                    self._streams.discard()
        finally:
            self._file.close()

    @property
    def begun_anew(self) -> bool:
        """Whether there was nothing to continue."""
        return self._file.begun_anew

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to continue: the file is finished, or nothing of it is noted."""
        return self._file.is_over

    def prepare(self) -> list[WorkUnit]:
        """Take over what an earlier run has left; returns the units that are to be encoded, in order."""
        spec, watch = self.spec, self.options.watch
        self._kept = self._file.take_over(self.order, self.options.jobs, watch)
        if spec.tuning is not None:
            self._kept = whole_layers(self.order, self._kept)
        self._todo = [unit for unit in self.order if unit.key not in self._kept]
        if spec.tuning is not None and spec.gathered is not None:
            from .tuned_layers import TunedLayers

            assert self._streams is not None
            self._tuned = TunedLayers(
                spec, spec.tuning, spec.gathered, self._file, self._streams, self._todo, watch
            )
        return self._todo

    def deliver(self, unit: WorkUnit, done: Encoded) -> None:
        """Take an encoded unit; where layers are tuned, it is written when its layer is."""
        for ready, complete_unit in self._tuned.add(unit, done) if self._tuned else [(unit, done)]:
            self._file.put(ready, complete_unit.payload.data, complete_unit.record)
            self._stands(ready)

    def encode_on(self, cluster: Cluster) -> None:
        """Have a cluster encode and write what is to be encoded."""
        cluster.run(self.spec, self.order, self._todo, self._file, self._stands)

    def _stands(self, unit: WorkUnit) -> None:
        self.options.watch.advance(unit.weights, unit.key)
        self.options.on_done(unit)

    def sync(self) -> None:
        """Wait until everything that was written is on the disk."""
        self._file.sync()

    def finish(self) -> BuildResult:
        """Give the complete file its name."""
        spec, options = self.spec, self.options
        laid, outcome = self._part or spec.plan, self._outcome()
        path = self._commit(outcome)
        seconds, weights = time.monotonic() - self._began, sum(unit.weights for unit in self._todo)
        return BuildResult(
            path=path,
            total_bytes=path.stat().st_size,
            tensor_count=len(laid.tensors),
            quantization_hash=outcome.quantization_hash,
            seconds=round(seconds, 3),
            weights_per_second=round(weights / seconds),
            peak_rss_bytes=peak_rss(),
            coverage=spec.importance.coverage if spec.importance else None,
            fallbacks=tuple(note for layer in outcome.layers for note in layer["fallbacks"]),
            engine=engine_warnings(spec.plan),
            fit=spec.recipe.fit,
            device=options.cluster.device if options.cluster else options.encoder.device,
            units=len(self.order),
            resumed_units=len(self._kept),
        )

    def _commit(self, outcome: Outcome) -> Path:
        """Complete the file, or the part with the record that a merge needs."""
        spec, part = self.spec, self._part
        if part is not None:
            before, after = sealed(spec, part, self._file.done, outcome.layers, outcome.calibration)
            return self._file.commit(before, after)
        metas = [t.meta() for t in spec.plan.tensors]
        return self._file.commit(layout(complete(spec.metadata, outcome), metas).header)

    def _outcome(self) -> Outcome:
        gathered, part = self.spec.gathered, self._part
        calibration = self.spec.calibration
        if gathered is not None and (part is None or part.layers.last == part.layers.of - 1):
            calibration = gathered.finish()
        running = self._file.hash
        return Outcome(running.quantization_hash, running.checksums, self._reports(), calibration)

    def _reports(self) -> list[dict[str, Any]]:
        """What is to be said of each layer in file order, from journal lines of this run and of earlier ones."""
        done, in_file = self._file.done, sorted(self.order, key=lambda unit: unit.start)
        notes: dict[int | None, dict[int, Notes]] = defaultdict(dict)
        for unit in in_file:
            if unit.expert is not None and (found := done[unit.key].get("notes")):
                notes[unit.layer][unit.expert] = found
        experts = self.spec.plan.config.num_local_experts
        reports = [(unit.layer, found) for unit in in_file if (found := done[unit.key].get("report"))]
        return [with_notes(report, notes[layer], experts) for layer, report in reports]


def default_name(recipe: Recipe, part: LayerRange | None) -> str:
    """The name of what a build makes, where the user gives none."""
    return output_name(recipe) if part is None else f"{output_name(recipe)}.layers-{part}"


def build_file(
    recipe: Recipe,
    statistics: Statistics | None = None,
    options: RunOptions = RunOptions(),
    changes: RecipeChanges = UNCHANGED,
    part: LayerRange | None = None,
) -> BuildResult:
    """Build a recipe's file, or one `part` of it, or continue its unfinished build.

    Without `statistics` the recipe's own imatrix is used.

    The final name appears only when every byte is written and synced. Raises the errors of `open_builds` and `Build`,
    before any work where the inputs show what is wrong.
    """
    name = default_name(recipe, part)
    options.check(name, 0, 0)
    inputs = local_folder(recipe.model.place.address), *input_paths(statistics)
    check_no_input(options.destination(name).path, inputs)
    if part is not None and isinstance(statistics, OnTheFly) and statistics.tuning is not None:
        raise RecipeError(
            "a tuned layer follows from all layers before it, so it cannot be built without them",
            hint="build the parts with --effort calibrated, merge them, and tune the file with `mq-quant tune`",
        )
    if options.cluster is not None:
        options.cluster.check(statistics)
    shards = options.shard_cache or (4 if isinstance(statistics, OnTheFly) else 2)
    scratch = options.output.parent if options.output else Path()

    def check(sizes: Sequence[int], besides: int) -> None:
        options.check(name, sum(sizes) if part is None else 0, besides)

    opened = open_builds(
        [recipe],
        statistics,
        changes,
        check=check,
        shard_cache=shards,
        scratch=scratch,
        watch=options.watch,
        hash_source=options.cluster.hash_source if options.cluster else nothing,
    )
    with opened as (spec,), Build(spec, options, part) as build:
        for sentence in spec.notes:
            options.on_note(sentence)
        return run_builds({0: build}, beside(options.destination(name).path, CALIBRATION), options)[0]
