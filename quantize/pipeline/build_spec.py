"""A job: a recipe with its source, imatrix or calibration, and plan, all checked on metadata alone, ready to be built.

Depends on formats, awq, plan, metadata and sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...awq.from_imatrix import load_importance
from ...awq.from_moments import blank_record, load_calibration
from ...awq.importance import ModelImportance
from ...formats.checkpoint.source import Source
from ...formats.errors import CheckpointError, ImatrixError, RecipeError
from ...formats.minimax import normalize_config
from ...formats.statistics.imatrix import read_imatrix
from ..calibrate.tokens import TokenRequest, load_tokens
from ..encode.layer_encoder import FitSettings, fit_settings
from ..spec.metadata import template, totals_of
from ..spec.places import local_folder, open_place, side_files
from ..spec.plan import Plan, make_plan, plan_tensors
from ..spec.provenance import flatten, program
from ..spec.recipe import Fit, Recipe

if TYPE_CHECKING:
    from ..calibrate.on_the_fly import InlineCalibration

CheckOutput = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Changes:
    """What the command line changes in a recipe; None keeps the recipe's own."""

    fit: Fit | None = None
    gain: bool | None = None
    alpha: float | None = None
    imatrix: Path | None = None
    no_imatrix: bool = False
    calibration: Path | None = None
    inline: TokenRequest | None = None
    inline_device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """Everything that decides a file's bytes. `signature` names each part, so that two jobs can be told apart.

    `calibration` is what the file will say of the folder in use; `inline` is the importance where the build gathers it.
    """

    recipe: Recipe
    source: Source
    importance: ModelImportance | None
    settings: FitSettings
    plan: Plan
    metadata: Mapping[str, Any]
    signature: Mapping[str, Any]
    calibration: Mapping[str, Any] | None = None
    inline: InlineCalibration | None = None

    def disk_bytes(self) -> int:
        """The most disk that the build takes besides its output."""
        return self.source.disk_bytes() + (self.inline.disk_bytes if self.inline else 0)

    @property
    def output_name(self) -> str:
        return output_name(self.recipe)


def output_name(recipe: Recipe) -> str:
    """The name of the file that a recipe makes, where the user gives none."""
    return f"{recipe.model.name}.{recipe.tier}"


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe as it will be built; without an imatrix there is no AWQ, and `hessian` becomes `exact`.

    Raises RecipeError where the changes contradict each other.
    """
    if changes.no_imatrix and (changes.imatrix or changes.fit == "hessian" or changes.alpha):
        raise RecipeError(
            "--no-imatrix leaves nothing for --imatrix, --fit hessian or --awq-alpha to work with"
        )
    if (changes.calibration or changes.inline) and changes.no_imatrix:
        raise RecipeError("a calibration is an importance, --no-imatrix asks for none: give one of the two")
    if changes.calibration and changes.inline:
        raise RecipeError("--calibrate-inline gathers what --calibration has already: give one of the two")
    fit = changes.fit or recipe.fit
    alpha = changes.alpha if changes.alpha is not None else recipe.awq.alpha
    if changes.no_imatrix:
        fit, alpha = "exact" if fit == "hessian" else fit, 0.0
    fold = 0.0 if changes.no_imatrix else recipe.awq.fold_down
    awq = recipe.awq.model_copy(update={"alpha": alpha, "fold_down": fold})
    gain = recipe.gain if changes.gain is None else changes.gain
    return recipe.model_copy(update={"fit": fit, "gain": gain, "awq": awq})


def open_source(recipe: Recipe, shard_cache: int, scratch: Path | None) -> Source:
    """The weights that a recipe names, their whole inventory checked on metadata alone."""
    where = recipe.model.place
    source = open_place(where.address, where.revision, shard_cache, scratch)
    source.validate()
    return source


def _imatrix_file(recipe: Recipe, changes: Changes) -> Path | None:
    if changes.imatrix is not None:
        return changes.imatrix
    if changes.no_imatrix or changes.calibration or changes.inline:
        return None
    ref = recipe.model.imatrix
    if ref is None:
        raise ImatrixError(
            "no imatrix was given, and there is none of its own for this source",
            hint="give --imatrix FILE (llama.cpp's GGUF or .dat), or --no-imatrix for a plain build",
        )
    if ref.repository is not None:
        from ...formats.hub.files import fetch_file

        return fetch_file(ref.repository, ref.file, ref.revision)
    folder = local_folder(recipe.model.place.address)
    assert folder is not None
    return folder / ref.file


def _pinned(recipe: Recipe, changes: Changes, source: Source, imatrix: Path | None) -> Recipe:
    """The recipe as it was resolved: revisions of its repositories, and its imatrix only where that one is used."""
    model = recipe.model
    if "revision" in source.origin:  # a snapshot's folder names its repository too
        where = {"folder": None, **source.origin}
        model = model.model_copy(update={"place": model.place.model_copy(update=where)})
    ref = model.imatrix
    if imatrix is None or changes.imatrix is not None:
        model = model.model_copy(update={"imatrix": None})
    elif ref is not None and ref.repository is not None:
        commit = imatrix.parents[len(Path(ref.file).parts) - 1].name
        model = model.model_copy(update={"imatrix": ref.model_copy(update={"revision": commit})})
    return recipe.model_copy(update={"model": model})


@contextmanager
def open_job(
    recipe: Recipe,
    changes: Changes,
    check: CheckOutput | None = None,
    shard_cache: int = 2,
    scratch: Path | None = None,
) -> Iterator[Job]:
    """Resolve and check everything before any work; raises the error of whatever does not fit.

    `check` is called, before anything large is read, with the output's default name, its size, and the disk that the
    source takes; streamed shards are kept in `scratch`.
    """
    recipe = changed(recipe, changes)
    source = open_source(recipe, shard_cache, scratch)
    try:
        yield _job(recipe, changes, source, check)
    finally:
        source.close()


def _inline(changes: Changes, source: Source) -> InlineCalibration | None:
    """The calibration that the build will gather, its tokens and device checked; torch is loaded for it alone."""
    if changes.inline is None:
        return None
    from ..calibrate.on_the_fly import InlineCalibration

    return InlineCalibration(source, load_tokens(source, changes.inline), changes.inline_device)


def _job(recipe: Recipe, changes: Changes, source: Source, check: CheckOutput | None) -> Job:
    config = source.config
    tensors = plan_tensors(recipe, config)
    inline = _inline(changes, source)
    if check is not None:
        gathered = inline.disk_bytes if inline else 0
        check(output_name(recipe), sum(t.nbytes for t in tensors), source.disk_bytes() + gathered)
    path = _imatrix_file(recipe, changes)
    recipe = _pinned(recipe, changes, source, path)
    imatrix = read_imatrix(path) if path else None
    from_imatrix = load_importance(imatrix, config) if imatrix else None
    side = side_files(source.side_file)
    if side.tokenizer is None:
        raise CheckpointError(
            "has no tokenizer.json, which the engine reads from the file", file=recipe.model.place.address
        )
    skipped = sum(math.prod(source.tensors[name].shape) for name in source.skipped_mtp)
    made_from: dict[str, Any] = {
        "recipe": recipe.resolved(),
        "source": {"origin": source.origin, "files": source.fingerprint()},
        "imatrix": from_imatrix.record() if from_imatrix else None,
    }
    calibrated, record, stated = None, None, made_from
    if changes.calibration is not None:
        calibrated = load_calibration(changes.calibration, config, made_from["source"], from_imatrix)
        record = made_from["calibration"] = calibrated.record()
        stated = {**made_from, "calibration": blank_record(record)}
    elif inline is not None:
        inline.bind(made_from["source"], from_imatrix)
        made_from["calibration"] = inline.signature()
        stated = {**made_from, "calibration": blank_record(inline.record())}
    provenance = {"program": program(), **stated, "skipped_tensors": len(source.skipped_mtp)}
    metadata = template(source.raw_config, side, config, totals_of(tensors), provenance, skipped)
    plan = make_plan(recipe, config, tensors, metadata)
    settings = fit_settings(recipe)
    signature = {
        "program": program()["version"],
        "plan": plan.digest(),
        "config": normalize_config(source.raw_config),
        **made_from,
    }
    importance = calibrated or inline or from_imatrix
    keys = dict(flatten(signature))
    return Job(recipe, source, importance, settings, plan, metadata, keys, record, inline)
