"""A person's request for the best file of a size: what is resolved before the source is opened, and what after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...formats.errors import BudgetError
from ...formats.hfq.provenance import Provenance
from ...formats.minimax import ModelConfig, parse_config
from ..spec.places import choose_recipe, model_files
from ..spec.recipe import Model, Recipe, tiers
from .budget import Budget
from .fitted import BASE, Avoided, Fitted, Fitting
from .generic import generic
from .losses import Losses, measured
from .matching import check_effort, reservations
from .measurement import read_measurement

if TYPE_CHECKING:
    from ..pipeline.build import BuildResult
    from ..pipeline.build_spec import BuildSpec

    Make = Callable[[Recipe, Callable[[BuildSpec], None]], BuildResult]


@dataclass(frozen=True)
class FitRequest:
    """What a person asks for: a source (None: the released model) and a budget. `measurement` is a file of `measure`;
    without it losses are those that are typical of other models. Pieces do not take what is `avoided`.
    """

    source: str | None
    revision: str | None
    budget: Budget
    measurement: Path | None = None
    avoided: Avoided = ()

    def __str__(self) -> str:
        return self.budget.name

    @property
    def asked(self) -> str:
        """The options that ask for it, but for the source and the measurement."""
        avoid = (f"--avoid {projection}:{name}" for projection, name in sorted(self.avoided))
        return " ".join((self.budget.option, *avoid))


def fit(request: FitRequest, sure: bool = False) -> Fitted:
    """The best recipe under a budget. A file may turn out a few kilobytes larger than `plan` says, which counts no
    provenance; `sure` leaves room for that.

    Raises BudgetError where no file of the model has such a size, MeasurementError for a measurement that is not of the
    model, RecipeError or WeightError where the model cannot be planned.
    """
    standard = {name: choose_recipe(name, None, request.source, request.revision) for name in tiers()}
    model = standard[BASE].model
    files = model_files(model)
    config = parse_config(files.config)
    losses = generic(config) if request.measurement is None else _measured(request.measurement, model, config)
    return Fitting(standard, files, config, request.budget, losses, request.avoided, sure).best()


class OverBudgetError(BudgetError):
    """A file that turned out larger than its budget once its source was open."""


def accept(spec: BuildSpec, fitted: Fitted, request: FitRequest) -> tuple[str, ...]:
    """Hold what a build resolved against the budget and against what was measured, before any work; sentences on why
    what is expected may be off.

    Raises OverBudgetError or MeasurementError.
    """
    if spec.plan.total_bytes > fitted.limit:
        raise OverBudgetError(
            f"the file of {fitted.recipe.tier} takes {spec.plan.total_bytes} bytes, and {request.budget.option} leaves "
            f"{fitted.limit}"
        )
    if request.measurement is None:
        return ()
    made = Provenance.read(spec.metadata)
    measurement = read_measurement(request.measurement)
    measurement.check_model(spec.plan.config, spec.source.origin, made.source.files if made.source else None)
    check_effort(measurement, spec.recipe.effort)
    return tuple(reservations(measurement, made))


def build_within(
    request: FitRequest, make: Make, accepted: Callable[[Fitted, tuple[str, ...]], None]
) -> BuildResult:
    """Build the best file of a budget: `make` builds a recipe, whose build is held to the budget by what it is given.

    `accepted` hears what was chosen, and why what is expected may be off, once the source is seen to have room for it
    and before anything is written. Raises the errors of `fit` and `accept`.
    """

    def built(fitted: Fitted) -> BuildResult:
        return make(fitted.recipe, lambda spec: accepted(fitted, accept(spec, fitted, request)))

    try:
        return built(fit(request))
    except OverBudgetError:
        return built(fit(request, sure=True))


def _measured(path: Path, model: Model, config: ModelConfig) -> Losses:
    """The losses in a file of `measure`, which must be of this model."""
    measurement = read_measurement(path)
    repository = model.place.repository
    measurement.check_model(config, {"repository": repository} if repository else None)
    return measured(measurement)
