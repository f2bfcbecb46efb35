"""What is built: a recipe with its source, statistics and plan, all resolved and checked on metadata alone.

A `BuildSpec` decides every byte of the file. How it is run (jobs, device, output) decides none: see `build`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...awq.importance import ModelImportance
from ...formats.checkpoint.source import Source
from ...formats.errors import CheckpointError, RecipeError
from ...formats.watch import UNWATCHED, Watch
from ..encode.prepared_layer import FitSettings, fit_settings
from ..spec.hooks import nothing
from ..spec.metadata import SideFiles, template, totals_of
from ..spec.places import checked_place, side_files
from ..spec.plan import Plan, PlannedTensor, make_plan, plan_tensors
from ..spec.provenance import code, flatten, program
from ..spec.recipe import Awq, Fit, Recipe
from .statistics import (
    Importances,
    NoStatistics,
    OnTheFly,
    Statistics,
    begin_gathering,
    check_pin,
    effort_of,
    find,
    imatrix_path,
    open_imatrix,
    own_imatrix,
)

if TYPE_CHECKING:
    from ..calibrate.on_the_fly import GatheredImportance
    from ..tune.layer import TuneSettings

SpaceCheck = Callable[[Sequence[int], int], None]
"""Called before anything large is read: with the bytes of each output, and the disk taken besides."""

SourceHook = Callable[[Source, Watch], None]
"""Called with a source that is open and validated, before it is hashed."""


@dataclass(frozen=True)
class RecipeChanges:
    """What is changed in a recipe for one build; None keeps the recipe's own."""

    fit: Fit | None = None
    gain: bool | None = None
    alpha: float | None = None

    def apply(self, recipe: Recipe, statistics: Statistics | None = None) -> Recipe:
        """The recipe as it will be built: without statistics there is no AWQ, and the fit `hessian` becomes `exact`.

        Raises RecipeError where a change asks for what only statistics make possible, and there are none, or where
        alpha is out of range.
        """
        fit = self.fit or recipe.fit
        gain = recipe.gain if self.gain is None else self.gain
        alpha = recipe.awq.alpha if self.alpha is None else self.alpha
        fold = recipe.awq.fold_down
        if isinstance(statistics, NoStatistics):
            if self.fit == "hessian" or self.alpha:
                raise RecipeError(
                    "the fit hessian and an AWQ exponent need statistics, and this is a plain build",
                    hint="leave them out, or leave --no-imatrix out",
                )
            fit, alpha, fold = "exact" if fit == "hessian" else fit, 0.0, 0.0
        awq = Awq.checked(alpha, fold)
        return recipe.model_copy(
            update={"effort": effort_of(statistics), "fit": fit, "gain": gain, "awq": awq}
        )


UNCHANGED = RecipeChanges()


NOT_SENSITIVE = (
    "what errors behind each layer cost stays unknown, since the source would be read twice more: from a folder that "
    "has the checkpoint, the same build has about a seventh less divergence at 3 and 4 bits (--no-sensitivity leaves "
    "it out without a word)"
)


@dataclass(frozen=True)
class BuildSpec:
    """Everything that decides a file's bytes. `signature` names each part (inputs by their hashes), so that two specs
    can be told apart.

    `calibration` is what the file will say of its calibration; `gathered` is the importance where the build gathers it,
    and `tuning` how its layers are tuned after they are rounded, if they are. `statistics` is what was asked for.
    """

    recipe: Recipe
    source: Source
    importance: ModelImportance | None
    rounding: FitSettings
    plan: Plan
    metadata: Mapping[str, Any]
    signature: Mapping[str, Any]
    calibration: Mapping[str, Any] | None = None
    gathered: GatheredImportance | None = None
    tuning: TuneSettings | None = None
    statistics: Statistics | None = None

    def disk_bytes(self) -> int:
        """The most disk that the build takes besides its output."""
        return self.source.disk_bytes() + (self.gathered.disk_bytes() if self.gathered else 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user, before the work."""
        could = isinstance(self.statistics, OnTheFly) and self.statistics.sensitivity is None
        lacks = could and self.gathered is not None and not self.gathered.sensitive
        return (*self.source.notes, *((NOT_SENSITIVE,) if lacks else ()))

    @property
    def output_name(self) -> str:
        return output_name(self.recipe)


def output_name(recipe: Recipe) -> str:
    """The name of the file that a recipe makes, where the user gives none."""
    return f"{recipe.model.name}.{recipe.tier}"


@contextmanager
def open_builds(
    recipes: Sequence[Recipe],
    statistics: Statistics | None = None,
    changes: RecipeChanges = UNCHANGED,
    *,
    check: SpaceCheck | None = None,
    shard_cache: int = 2,
    scratch: Path | None = None,
    watch: Watch = UNWATCHED,
    hash_source: SourceHook = nothing,
) -> Iterator[list[BuildSpec]]:
    """Resolve and check everything before any work; raises the error of whatever does not fit.

    The recipes are of one model. Without `statistics` their own imatrix is used. Streamed shards, at most `shard_cache`
    of them, are kept in `scratch`. `watch` hears of the hashing of the source, which is open until the end of the
    block. `hash_source(source, watch)` may hash some of it before.
    """
    recipes = [changes.apply(recipe, statistics) for recipe in recipes]
    where = recipes[0].model.place
    with checked_place(where.address, where.revision, shard_cache, scratch) as source:
        hash_source(source, watch)
        yield resolve_all(recipes, statistics, source, check, watch)


def resolve(
    recipe: Recipe,
    statistics: Statistics | None,
    source: Source,
    check: SpaceCheck | None = None,
    watch: Watch = UNWATCHED,
) -> BuildSpec:
    """`resolve_all` of one recipe."""
    return resolve_all([recipe], statistics, source, check, watch)[0]


def resolve_all(
    recipes: Sequence[Recipe],
    statistics: Statistics | None,
    source: Source,
    check: SpaceCheck | None = None,
    watch: Watch = UNWATCHED,
) -> list[BuildSpec]:
    """The specs of recipes of one model for a source that is open and validated; the changes of a build are applied to
    them already. They have their source and their importance in common.

    Raises as `open_builds`.
    """
    config, recipe = source.config, recipes[0]
    tensors = [
        plan_tensors(each, config, scales=not isinstance(statistics, NoStatistics)) for each in recipes
    ]
    gathered = begin_gathering(statistics, source)
    if check is not None:
        besides = source.disk_bytes() + (gathered.disk_bytes(len(recipes)) if gathered else 0)
        check([sum(t.nbytes for t in some) for some in tensors], besides)
    path = imatrix_path(recipe, statistics)
    imatrix = open_imatrix(path, config)
    check_pin(recipe, statistics, imatrix)
    side = side_files(source.side_file)
    if side.tokenizer is None:
        raise CheckpointError(
            "has no tokenizer.json, which the engine reads from the file", file=recipe.model.place.address
        )
    made_from: dict[str, Any] = {"origin": source.origin, "files": source.fingerprint(watch)}
    inputs = _Inputs(
        source,
        made_from,
        side,
        find(statistics, imatrix, config, made_from, gathered),
        statistics,
    )
    own = path if own_imatrix(statistics) else None
    return [
        _spec(_pinned(each, source, own), some, inputs) for each, some in zip(recipes, tensors, strict=True)
    ]


@dataclass(frozen=True)
class _Inputs:
    """What specs of one model have in common; `made_from` is the source's {origin, files}."""

    source: Source
    made_from: Mapping[str, Any]
    side: SideFiles
    found: Importances
    statistics: Statistics | None


def _spec(recipe: Recipe, tensors: tuple[PlannedTensor, ...], inputs: _Inputs) -> BuildSpec:
    source, made_from, found = inputs.source, inputs.made_from, inputs.found
    statistics = inputs.statistics
    resolved, skipped = recipe.resolved(), source.skipped_mtp
    provenance = {
        "program": program(),
        "recipe": resolved,
        "source": made_from,
        **found.stated,
        "skipped_tensors": len(skipped),
    }
    left_out = sum(math.prod(source.tensors[name].shape) for name in skipped)
    totals = totals_of(tensors)
    metadata = template(source.raw_config, inputs.side, source.config, totals, provenance, left_out)
    plan = make_plan(recipe, source.config, tensors, metadata)
    hashes = {name: {"sha256": file["sha256"]} for name, file in made_from["files"].items()}
    signature = {
        "program": program()["version"],
        "code": code(),
        "plan": plan.digest(),
        "recipe": resolved,
        "source": {"origin": source.origin, "files": hashes},
        **found.signature,
    }
    return BuildSpec(
        recipe=recipe,
        source=source,
        importance=found.model,
        rounding=fit_settings(recipe),
        plan=plan,
        metadata=metadata,
        signature=dict(flatten(signature)),
        calibration=found.record,
        gathered=found.gathered,
        tuning=statistics.tuning if isinstance(statistics, OnTheFly) else None,
        statistics=statistics,
    )


def _pinned(recipe: Recipe, source: Source, own_imatrix: Path | None) -> Recipe:
    """The recipe as it was resolved: revisions of its repositories, and its own imatrix only where that one is used."""
    model = recipe.model
    if "revision" in source.origin:  # a snapshot's folder names its repository too
        where = {"folder": None, **source.origin}
        model = model.model_copy(update={"place": model.place.model_copy(update=where)})
    ref = model.imatrix
    if own_imatrix is None:
        model = model.model_copy(update={"imatrix": None})
    elif ref is not None and ref.repository is not None:
        commit = own_imatrix.parents[len(Path(ref.file).parts) - 1].name
        model = model.model_copy(update={"imatrix": ref.model_copy(update={"revision": commit})})
    return recipe.model_copy(update={"model": model})
