"""The options that ask for the best file of a size, as a request to `fit`; and what is said of the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import gigabytes, note, paragraph

if TYPE_CHECKING:
    from ..fit.fitted import Fitted
    from ..fit.request import FitRequest, Make
    from ..pipeline.build import BuildResult
    from ..spec.estimates import PlanSummary


def fit_request(
    budget: tuple[str | None, str | None, float | None, int | None],
    named: tuple[object, object],
    source: tuple[str | None, str | None],
    measurement: Path | None,
    avoid: Sequence[str] | None,
    write_recipe: Path | None,
) -> FitRequest | None:
    """The request that options make: `budget` is --memory, --size, --bits and --context, `named` --tier and --recipe,
    `source` the source and its revision. None where no budget is given.

    Raises BudgetError where options contradict each other.
    """
    if all(given is None for given in (*budget, measurement, avoid or None, write_recipe)):
        return None
    from ...formats.errors import BudgetError
    from ..fit.avoided import read_avoided
    from ..fit.budget import read_budget
    from ..fit.request import FitRequest

    asked = read_budget(*budget)
    if asked is None:
        raise BudgetError(
            "--measurement, --avoid and --write-recipe go with a budget",
            hint="give --memory, --size or --bits too, or leave them out",
        )
    if any(named):
        raise BudgetError(
            f"{asked.option} chooses the formats that --tier and --recipe name", hint="give one of them"
        )
    return FitRequest(*source, asked, measurement, read_avoided(avoid or ()))


def build_told(request: FitRequest, recipe_file: Path | None, make: Make) -> BuildResult:
    """Build the best file of a budget, and say what was chosen once the source is seen to have room for it."""
    from ..fit.request import build_within
    from ..fit.written import write_recipe

    def accepted(fitted: Fitted, notes: tuple[str, ...]) -> None:
        if recipe_file is not None:
            write_recipe(recipe_file, fitted, request.asked)
        for line in (*told(fitted), *notes):
            note(line)

    return build_within(request, make, accepted)


def told(fitted: Fitted) -> Iterator[str]:
    """What was chosen, in lines."""
    from ..spec.by_layer import formats_by_layer

    at_most = gigabytes(fitted.limit)
    if fitted.tier:
        yield paragraph(
            f"no other choice of formats in {at_most} is known to lose less than the tier {fitted.tier}"
        )
    else:
        yield f"{fitted.recipe.tier}: the formats that lose least in {at_most}"
        for what, of in zip(
            ("gate and up", "down"), zip(*fitted.allocation.layers, strict=True), strict=True
        ):
            yield paragraph(f"{what}: {formats_by_layer(dict(enumerate(of)))}")
    if fitted.expected_kld is None:
        yield f"chosen by {fitted.origin}: `mq-quant measure` finds out those of this one"
    else:
        yield paragraph(f"chosen by {fitted.origin}; expected KLD there {fitted.expected_kld:.4g}")
    if fitted.wrong:
        avoid = " ".join(f"--avoid {name}" for name in fitted.wrong)
        yield f"{avoid} keeps clear of what newer engines compute wrongly"


@dataclass(frozen=True)
class FittedPlan:
    """What was chosen for a budget, why what is expected may be off, and what building it takes."""

    fitted: Fitted
    notes: tuple[str, ...]
    plan: PlanSummary

    def as_json(self) -> dict[str, Any]:
        return {**self.plan.as_json(), "fit": {**self.fitted.as_json(), "notes": list(self.notes)}}


def fitted_plan(
    request: FitRequest, recipe_file: Path | None, jobs: int | None, shard_cache: int, device: str
) -> FittedPlan:
    """The plan of the best file of a budget, whose recipe is written where that is asked for."""
    from ..fit.matching import reservations
    from ..fit.measurement import read_measurement
    from ..fit.request import fit
    from ..fit.written import write_recipe
    from ..spec.estimates import summary_of

    fitted = fit(request)
    if recipe_file is not None:
        write_recipe(recipe_file, fitted, request.asked)
    measured = read_measurement(request.measurement) if request.measurement else None
    notes = tuple(reservations(measured)) if measured else ()
    return FittedPlan(fitted, notes, summary_of(fitted.recipe, jobs, shard_cache, device))
