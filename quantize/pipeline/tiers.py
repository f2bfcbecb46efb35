"""Several tiers of one source in one pass: each tensor is read once and encoded for all of them.

Every tier has a file, a journal and a lock of its own, so that each is continued, verified and refused on its own. What
stops one of them does not stop the others. The bytes are those of a build of the tier alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...formats.errors import MqError, OutputError, RecipeError
from ...formats.hfq import open_hfq
from ...formats.hfq.provenance import KEY, PADDING
from ...formats.own_file import disk_errors, free_bytes
from ..spec.places import local_folder
from ..spec.provenance import flatten
from ..spec.recipe import Recipe
from ..write.inputs import check_no_input
from ..write.journal import SHOWN, differences
from ..write.partial_file import CALIBRATION, beside, held_bytes
from .build import Build, BuildResult, RunOptions
from .build_spec import UNCHANGED, BuildSpec, RecipeChanges, open_builds, output_name
from .run_builds import run_builds
from .statistics import OnTheFly, Statistics, input_paths


@dataclass(frozen=True)
class TierResult:
    """What became of one tier: it was made (`result`), or failed (`error`), or, where neither is given, stood there
    already.
    """

    tier: str
    path: Path
    result: BuildResult | None = None
    error: MqError | None = None

    @property
    def state(self) -> str:
        """What became of it, in words."""
        return "made" if self.result else "failed" if self.error else "finished already"

    def as_json(self) -> dict[str, Any]:
        """One entry of what `build --json` prints for several tiers."""
        return {
            "tier": self.tier,
            "path": str(self.path),
            "state": self.state,
            **({"result": self.result.as_json()} if self.result else {}),
            **({"error": self.error.as_json()} if self.error else {}),
        }


@dataclass(frozen=True)
class TierResults:
    """What became of each tier, in the order in which they were named."""

    tiers: tuple[TierResult, ...]

    @property
    def failed(self) -> tuple[TierResult, ...]:
        """The tiers that were not made."""
        return tuple(each for each in self.tiers if each.error is not None)

    def raise_if_failed(self) -> None:
        """Raise the error of the first tier that was not made."""
        for each in self.failed:
            assert each.error is not None
            raise each.error

    def as_json(self) -> dict[str, Any]:
        """What `build --json` prints for several tiers."""
        return {"tiers": [each.as_json() for each in self.tiers]}


def build_files(
    recipes: Sequence[Recipe],
    folder: Path,
    statistics: Statistics | None,
    options: RunOptions,
    changes: RecipeChanges = UNCHANGED,
) -> TierResults:
    """Build the files of several recipes of one model into a folder, or continue their unfinished builds.

    Each has its default name, and `options.output` is not looked at. A file that stands there already is left as it is
    where it was made from the same recipe and inputs. An error of one file alone, such as an output that another build
    is writing, is in its result, and the others are made. Raises what concerns all of them: the errors of
    `open_builds`, OutputError where the folder is missing or has no room for all, RecipeError where the recipes are not
    of one model.
    """
    paths = [folder / output_name(recipe) for recipe in recipes]
    _check_recipes(recipes, paths)
    if not folder.is_dir():
        raise OutputError("its folder does not exist", file=folder, hint=f"mkdir -p {folder}")
    failed: dict[int, MqError] = {}

    def fail(n: int, error: MqError) -> None:
        failed[n] = error
        options.on_note(f"{recipes[n].tier} is left out, the others go on: {error.problem}")

    @contextmanager
    def alone(n: int) -> Iterator[None]:
        """A block that concerns one file."""
        try:
            yield
        except MqError as e:
            fail(n, e)

    each = [replace(options, output=path) for path in paths]
    standing = {n for n, path in enumerate(paths) if path.is_file() and not options.force}
    inputs = local_folder(recipes[0].model.place.address), *input_paths(statistics)
    for n, path in enumerate(paths):
        if n not in standing:
            with alone(n):
                each[n].check(path.name, 0, 0)
                check_no_input(path, inputs)

    def check(sizes: Sequence[int], besides: int) -> None:
        coming = {path: sizes[n] for n, path in enumerate(paths) if n not in standing and n not in failed}
        check_room(folder, coming, besides)

    results: dict[int, BuildResult] = {}
    if len(failed) < len(paths):
        shards = options.shard_cache or (4 if isinstance(statistics, OnTheFly) else 2)
        opened = open_builds(
            recipes, statistics, changes, check=check, shard_cache=shards, scratch=folder, watch=options.watch
        )
        with opened as specs, ExitStack() as stack:
            for sentence in specs[0].notes:
                options.on_note(sentence)
            builds: dict[int, Build] = {}
            for n, spec in enumerate(specs):
                if n in failed:
                    continue
                with alone(n):
                    if n in standing:
                        check_same(paths[n], spec)
                        options.on_note(f"{recipes[n].tier} is finished already: {paths[n]} stays as it is")
                    else:
                        builds[n] = stack.enter_context(Build(spec, each[n]))
            if builds:
                moments = beside(folder / recipes[0].model.name, CALIBRATION)
                results = run_builds(builds, moments, options, fail)
    return TierResults(
        tuple(
            TierResult(recipe.tier, path, results.get(n), failed.get(n))
            for n, (recipe, path) in enumerate(zip(recipes, paths, strict=True))
        )
    )


def one_effort(recipes: Sequence[Recipe], chosen: Sequence[Statistics | None]) -> Statistics | None:
    """The statistics that were chosen for all of some recipes; RecipeError where they differ."""
    for recipe, statistics in zip(recipes, chosen, strict=True):
        if statistics != chosen[0]:
            raise RecipeError(
                f"the tiers {recipes[0].tier} and {recipe.tier} have different efforts",
                hint="give --effort, which is then that of all of them",
            )
    return chosen[0] if chosen else None


def _check_recipes(recipes: Sequence[Recipe], paths: Sequence[Path]) -> None:
    """RecipeError where recipes are not of one model, or two of them have one file."""
    if not recipes:
        raise RecipeError("no tier was given", hint="give --tier, once for each of them, or --all-tiers")
    for n, (recipe, path) in enumerate(zip(recipes, paths, strict=True)):
        if path in paths[:n]:
            raise RecipeError(f"the tier {recipe.tier} is given twice", hint="name each tier once")
        if recipe.model != recipes[0].model:
            raise RecipeError(
                f"the tiers {recipes[0].tier} and {recipe.tier} are of different models or sources",
                hint="build them one after the other",
            )


def check_room(folder: Path, coming: Mapping[Path, int], besides: int) -> None:
    """OutputError where the disk of a folder has no room for all files that are coming, with what is taken besides."""
    with disk_errors(folder):
        free = free_bytes(folder)
    needed = sum(coming.values()) + besides
    if free is not None and (room := free + sum(map(held_bytes, coming))) < needed:
        raise OutputError(
            f"the tiers need {needed / 1e9:.1f} GB together and its disk has {room / 1e9:.1f} GB free",
            file=folder,
            hint="free some space, name fewer tiers, or give an --output-dir on another disk",
        )


def check_same(path: Path, spec: BuildSpec) -> None:
    """OutputError where a finished file was not made from what a spec says, as far as the file says it."""
    with open_hfq(path) as file:
        there = _stated(file.metadata.get(KEY))
    here = _stated(spec.metadata[KEY])
    different = differences({key: there.get(key) for key in here}, here)
    if different:
        raise OutputError(
            "exists already, and was made with other arguments or inputs:"
            + "".join(f"\n    {line}" for line in different[:SHOWN]),
            file=path,
            hint="give --force to replace it, or another --output-dir",
        )


def _stated(record: object) -> dict[str, Any]:
    """What a file says it was made from, key by key, without what is known only when it is finished."""
    flat = dict(flatten(json.loads(json.dumps(record)))) if isinstance(record, Mapping) else {}
    return {key: value for key, value in flat.items() if not key.startswith(_KNOWN_LATER)}


_KNOWN_LATER = (
    "layers",
    "checksums",
    "metadata_checksum",
    PADDING,
    "program.commit",
    "calibration.sha256",
    "calibration.coverage",
)
