"""How much is done for a file: what a person gave decides, then the recipe, then what the machine can do in one night.

`choose` turns all of that into statistics, on which a build is based.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ...formats.errors import RecipeError
from ...formats.minimax import parse_config
from ..calibrate.tokens import LENGTH, TokenRequest
from ..spec.calibration_sizes import usual_tokens
from ..spec.efforts import default_effort
from ..spec.places import model_files
from ..spec.recipe import Effort, Fit, Recipe
from .statistics import ImatrixFile, MomentFolder, NoStatistics, OnTheFly, Statistics


@dataclass(frozen=True)
class Wishes:
    """What a person asks of the statistics of a build; what is None or False was not given."""

    effort: Effort | None = None
    fit: Fit | None = None
    imatrix: Path | None = None
    no_imatrix: bool = False
    calibration: Path | None = None
    tokens: TokenRequest | None = None
    state: Path | None = None
    sensitivity: bool | None = None

    @property
    def gathers(self) -> bool:
        """Whether the build itself is to run the model on tokens."""
        asked = self.tokens is not None or self.state is not None or bool(self.sensitivity)
        return asked or self.effort in ("calibrated", "tuned")


_CONTRADICTIONS: tuple[tuple[Callable[[Wishes], object], str], ...] = (
    (lambda w: w.no_imatrix and w.imatrix, "--no-imatrix leaves nothing for --imatrix to do"),
    (
        lambda w: w.no_imatrix and (w.calibration or w.gathers),
        "a calibration is an importance, --no-imatrix asks for none",
    ),
    (lambda w: w.no_imatrix and w.effort, "--no-imatrix is a plain build, without any effort"),
    (lambda w: w.calibration and w.tokens, "--text and --tokens gather what --calibration has already"),
    (
        lambda w: w.calibration and w.effort == "tuned",
        "--effort tuned needs the model's outputs, which a folder of --calibration does not keep",
    ),
    (
        lambda w: w.state and w.calibration,
        "--calibration has the moments that --calibration-state helps to gather",
    ),
    (
        lambda w: w.state and w.effort in ("imatrix", "tuned"),
        "--calibration-state goes with --effort calibrated",
    ),
    (
        lambda w: w.sensitivity is not None and w.state,
        "--calibration-state has what errors behind each layer cost, or was made without",
    ),
    (
        lambda w: w.sensitivity and (w.calibration or w.no_imatrix or w.effort == "imatrix"),
        "--sensitivity goes with --effort calibrated or tuned",
    ),
    (
        lambda w: w.sensitivity and w.fit not in (None, "hessian"),
        "--sensitivity decides how the fit `hessian` rounds, and no other",
    ),
    (lambda w: w.effort == "imatrix" and w.tokens, "--effort imatrix does not look at --text or --tokens"),
    (lambda w: w.effort == "imatrix" and w.calibration, "--effort imatrix does not look at --calibration"),
)


def check(wishes: Wishes) -> None:
    """RecipeError where wishes contradict each other."""
    for contradicts, sentence in _CONTRADICTIONS:
        if contradicts(wishes):
            raise RecipeError(sentence, hint="give one of the two")


def _cpu() -> str:
    return "cpu"


def chosen_effort(recipe: Recipe, wishes: Wishes, device: Callable[[], str] = _cpu, jobs: int = 1) -> Effort:
    """The effort of a build: the one asked for, the recipe's, what follows from the statistics given, or what so many
    workers do in one night.

    An imatrix given alone is what a build rounds under, and fits that look at no importance need no more.
    """
    given = wishes.effort or recipe.effort
    if given is not None:
        return given
    if wishes.tokens or wishes.state or wishes.sensitivity:
        return "calibrated"
    if wishes.imatrix or (wishes.fit or recipe.fit) != "hessian":
        return "imatrix"
    config = parse_config(model_files(recipe.model).config)
    return default_effort(recipe, config, jobs, device())


def choose(
    recipe: Recipe, wishes: Wishes, device: Callable[[], str] = _cpu, jobs: int = 1
) -> Statistics | None:
    """The statistics of a build on a device of torch's with so many workers; None for the recipe's own imatrix.

    `device` is asked only where it matters, since the answer may take as long as torch takes to load.
    Raises RecipeError where wishes contradict each other, and ConfigError where the model's config is needed and wrong.
    """
    check(wishes)
    if wishes.no_imatrix:
        return NoStatistics()
    if wishes.calibration is not None:
        return MomentFolder(wishes.calibration, wishes.imatrix)
    effort = chosen_effort(recipe, wishes, device, jobs)
    if effort == "imatrix":
        return None if wishes.imatrix is None else ImatrixFile(wishes.imatrix)
    where = device()
    tokens = wishes.tokens or TokenRequest(sequences=_sequences(recipe, where))
    used = (wishes.fit or recipe.fit) == "hessian" or wishes.state is not None
    sensitivity = wishes.sensitivity if used else False
    calibrated = OnTheFly(tokens, where, wishes.imatrix, state=wishes.state, sensitivity=sensitivity)
    if effort != "tuned":
        return calibrated
    from ..tune.layer import TuneSettings

    return replace(calibrated, tuning=TuneSettings())


def _sequences(recipe: Recipe, device: str) -> int | None:
    """How much of the package's own text is taken; None on a CPU, where it is the usual amount."""
    if device == "cpu":
        return None
    return usual_tokens(parse_config(model_files(recipe.model).config), device) // LENGTH
