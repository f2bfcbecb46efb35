"""What `import mq_quant` offers of files for a size: measuring a model, choosing formats, building what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .api import Device, chosen_statistics, open_source, run_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .fit.fitted import Fitted
    from .fit.request import FitRequest
    from .fit.run import MeasureResult
    from .pipeline.build import BuildResult
    from .pipeline.build_spec import BuildSpec
    from .pipeline.statistics import Statistics
    from .pipeline.work_units import WorkUnit
    from .spec.recipe import Effort, Recipe


def measure_model(
    source: str | Path,
    output: str | Path = "measurement.json",
    *,
    effort: Literal["imatrix", "calibrated"] = "calibrated",
    statistics: str | Path | None = None,
    tokens: NDArray[np.integer] | None = None,
    judge_tokens: NDArray[np.integer] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    held_out: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    jobs: int | None = None,
    force: bool = False,
    restart: bool = False,
) -> MeasureResult:
    """Measure what each piece of a source loses in each format, and write it to `output` as JSON, or continue there.

    Pieces are rounded as a build of `effort` rounds them, on token ids [sequences, length] or on the calibration text
    of mq-quant, cut into `sequences` of `length` (None: 512); `statistics` is an imatrix (a file) or a calibration (a
    folder) instead. Predictions are compared on `held_out` sequences of `judge_tokens`, or else of the evaluation text,
    of `tokens` where these are given. Raises TokenError for ids that are not the source's or too few, InputError for
    what would be without effect, OutputError before any work where the output exists (without `force`), ResumeError
    where an unfinished measurement there is of other arguments (without `restart`).
    """
    from ..formats.machine import cores
    from .calibrate.tokens import check_tokens, own_text
    from .encode.encoders import open_encoder
    from .fit.before import measuring_statistics, texts_of
    from .fit.run import TIER, MeasureOptions, measure
    from .spec.places import choose_recipe

    request = own_text(tokens, sequences, length)
    recipe = choose_recipe(TIER, None, str(source))
    place = None if statistics is None else Path(statistics)
    folder = place if place is not None and place.is_dir() else None
    known = measuring_statistics(effort, None if folder else place, folder, device)
    with closing(open_source(source)) as opened, open_encoder(device) as encoder:
        opened.validate()
        ids, judged = (
            None if given is None else check_tokens(given, opened.config, name)
            for given, name in ((tokens, "tokens"), (judge_tokens, "judge_tokens"))
        )
        texts = texts_of(opened, request if ids is None else ids, judged, held_out, effort == "calibrated")
        options = MeasureOptions(Path(output), device, jobs or cores(), encoder, force, restart)
        return measure(recipe, opened, texts, known, options)


def fit_recipe(
    *,
    memory: str | None = None,
    size: str | None = None,
    bits: float | None = None,
    context: int | None = None,
    source: str | Path | None = None,
    measurement: str | Path | None = None,
    avoid: Sequence[str] = (),
) -> Recipe:
    """The recipe that loses least in a memory ("96GB"), a file's size ("85.0GB") or so many bits per weight.

    `measurement` is a file of `measure_model`; without it losses are typical ones. `avoid` names formats, as in "MQ4"
    or "down:MQ4". Raises BudgetError where no file of the model is so large or so small, MeasurementError where the
    measurement is of another model.
    """
    from .fit.request import fit

    return fit(_request(memory, size, bits, context, source, measurement, avoid), sure=True).recipe


@dataclass(frozen=True)
class FittedBuild:
    """A file of a size: the formats that were chosen and what is expected of them, sentences on why that may be off,
    and what was built.
    """

    fitted: Fitted
    notes: tuple[str, ...]
    result: BuildResult


def build_fitted(
    output: str | Path | None = None,
    *,
    memory: str | None = None,
    size: str | None = None,
    bits: float | None = None,
    context: int | None = None,
    source: str | Path | None = None,
    measurement: str | Path | None = None,
    avoid: Sequence[str] = (),
    statistics: Statistics | str | Path | None = None,
    effort: Effort | None = None,
    device: Device = "cpu",
    jobs: int | None = None,
    force: bool = False,
    restart: bool = False,
    on_done: Callable[[WorkUnit], None] | None = None,
) -> FittedBuild:
    """Build the file that loses least in a memory, a size or so many bits per weight, or continue its build.

    The budget is given as to `fit_recipe`, everything else as to `build_file`. The finished file is never larger.
    Raises the errors of both, and MeasurementError where the measurement is of other weights or of another effort.
    """
    from .fit.request import build_within
    from .pipeline import build

    request = _request(memory, size, bits, context, source, measurement, avoid)
    path = None if output is None else Path(output)
    found: list[tuple[Fitted, tuple[str, ...]]] = []

    def accepted(fitted: Fitted, notes: tuple[str, ...]) -> None:
        found[:] = [(fitted, notes)]

    with run_options(device, jobs, force, restart, on_done, path) as options:

        def make(recipe: Recipe, accept: Callable[[BuildSpec], None]) -> BuildResult:
            known = chosen_statistics(recipe, statistics, effort, device, options.jobs)
            return build.build_file(recipe, known, replace(options, accept=accept))

        result = build_within(request, make, accepted)
    ((fitted, notes),) = found
    return FittedBuild(fitted, notes, result)


def _request(
    memory: str | None,
    size: str | None,
    bits: float | None,
    context: int | None,
    source: str | Path | None,
    measurement: str | Path | None,
    avoid: Sequence[str],
) -> FitRequest:
    from ..formats.errors import BudgetError
    from .fit.avoided import read_avoided
    from .fit.budget import read_budget
    from .fit.request import FitRequest

    budget = read_budget(memory, size, bits, context)
    if budget is None:
        raise BudgetError("no budget was given", hint="give memory, size or bits")
    file = None if measurement is None else Path(measurement)
    return FitRequest(None if source is None else str(source), None, budget, file, read_avoided(avoid))
