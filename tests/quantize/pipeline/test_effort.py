"""What decides the effort of a build: the person, then the recipe, then what was given to work with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats.errors import CalibrationError, RecipeError
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.calibrate.tokens import LENGTH, TokenRequest
from mq_quant.quantize.pipeline.effort import Wishes, choose, chosen_effort
from mq_quant.quantize.pipeline.statistics import ImatrixFile, MomentFolder, NoStatistics, OnTheFly, effort_of
from mq_quant.quantize.spec.calibration_sizes import GPU_TOKENS
from mq_quant.quantize.spec.efforts import default_effort, hours
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.spec.recipe import load_tier
from mq_quant.quantize.tune.layer import TuneSettings

RECIPE = choose_recipe("mq2", None, str(Path(__file__).parent))
"""Of a source that has no imatrix of its own, so that only what is wished decides."""
RELEASED = load_tier("mq2")
TINY = load_tier("mq2", "tiny")
FILE = Path("imatrix.gguf")
OWN = TokenRequest(tokens=Path("ids.npy"))


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        (Wishes(effort="calibrated", imatrix=FILE), OnTheFly(imatrix=FILE)),
        (Wishes(tokens=OWN), OnTheFly(OWN)),
        (Wishes(tokens=OWN, imatrix=FILE), OnTheFly(OWN, imatrix=FILE)),
        (Wishes(imatrix=FILE), ImatrixFile(FILE)),
        (Wishes(effort="imatrix"), None),
        (Wishes(effort="imatrix", imatrix=FILE), ImatrixFile(FILE)),
        (Wishes(calibration=Path("calib")), MomentFolder(Path("calib"))),
        (Wishes(calibration=Path("calib"), imatrix=FILE), MomentFolder(Path("calib"), FILE)),
        (Wishes(no_imatrix=True), NoStatistics()),
        (Wishes(calibration=Path("calib"), effort="calibrated"), MomentFolder(Path("calib"))),
        (Wishes(fit="reference"), None),
        (Wishes(fit="exact"), None),
        (Wishes(sensitivity=True), OnTheFly(sensitivity=True)),
        (Wishes(tokens=OWN, sensitivity=False), OnTheFly(OWN, sensitivity=False)),
        (Wishes(imatrix=FILE, sensitivity=True), OnTheFly(imatrix=FILE, sensitivity=True)),
        (Wishes(imatrix=FILE, sensitivity=False), ImatrixFile(FILE)),
        (Wishes(effort="imatrix", sensitivity=False), None),
        (Wishes(calibration=Path("calib"), sensitivity=False), MomentFolder(Path("calib"))),
        (Wishes(tokens=OWN, fit="exact"), OnTheFly(OWN, sensitivity=False)),
        (Wishes(state=FILE, fit="exact"), OnTheFly(state=FILE)),
    ],
)
def test_the_statistics_follow_from_what_was_given(wishes: Wishes, expected: Any) -> None:
    assert choose(RECIPE, wishes) == expected


def test_a_recipe_may_say_its_effort_and_the_person_has_the_last_word() -> None:
    assert chosen_effort(TINY, Wishes()) == "imatrix"
    assert chosen_effort(TINY, Wishes(effort="calibrated")) == "calibrated"
    calibrated = RECIPE.model_copy(update={"effort": "calibrated"})
    assert choose(calibrated, Wishes(imatrix=FILE)) == OnTheFly(imatrix=FILE)


@pytest.mark.parametrize(
    ("jobs", "effort"), [(1, "imatrix"), (2, "imatrix"), (16, "calibrated"), (64, "calibrated")]
)
def test_without_wishes_it_is_what_the_machine_does_in_a_night(jobs: int, effort: str) -> None:
    assert chosen_effort(RELEASED, Wishes(), jobs=jobs) == effort
    assert chosen_effort(RELEASED, Wishes(), lambda: "cuda") == "tuned"
    config = parse_config(RELEASED.model.config or {})
    unknown = RELEASED.model_copy(update={"model": RELEASED.model.model_copy(update={"imatrix": None})})
    assert default_effort(unknown, config, 1) == "calibrated", "there is no imatrix to do less with"


def test_an_effort_that_does_more_takes_longer() -> None:
    config = parse_config(RELEASED.model.config or {})
    fewest = hours(config, "imatrix", 0, 16)
    few, many = (hours(config, "calibrated", tokens, 16) for tokens in (65536, 524288))
    assert fewest < few < many < 8 * few
    assert hours(config, "calibrated", 65536, 2) == pytest.approx(8 * few)


def test_more_of_our_own_text_is_taken_on_a_gpu() -> None:
    own = TokenRequest(sequences=GPU_TOKENS // LENGTH)
    assert choose(RELEASED, Wishes(), lambda: "cuda") == OnTheFly(own, "cuda", tuning=TuneSettings())
    assert choose(RELEASED, Wishes("calibrated", tokens=OWN), lambda: "cuda") == OnTheFly(OWN, "cuda")


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(no_imatrix=True, imatrix=FILE),
        Wishes(no_imatrix=True, calibration=Path("calib")),
        Wishes(no_imatrix=True, tokens=OWN),
        Wishes(no_imatrix=True, effort="imatrix"),
        Wishes(no_imatrix=True, effort="calibrated"),
        Wishes(calibration=Path("calib"), tokens=OWN),
        Wishes(calibration=Path("calib"), effort="tuned"),
        Wishes(effort="imatrix", tokens=OWN),
        Wishes(effort="imatrix", calibration=Path("calib")),
        Wishes(sensitivity=True, calibration=Path("calib")),
        Wishes(sensitivity=True, effort="imatrix"),
        Wishes(sensitivity=True, no_imatrix=True),
        Wishes(sensitivity=True, state=Path("state")),
        Wishes(sensitivity=False, state=Path("state")),
        Wishes(sensitivity=True, fit="exact"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(wishes: Wishes) -> None:
    with pytest.raises(RecipeError, match="give one of the two"):
        choose(RECIPE, wishes)


def test_each_contradiction_of_sensitivity_is_told_in_its_own_words() -> None:
    """What the flags mean, whatever else is said before."""
    for wishes, said in (
        (Wishes(sensitivity=True, calibration=Path("calib")), "--sensitivity goes with --effort"),
        (Wishes(sensitivity=True, effort="imatrix"), "--sensitivity goes with --effort"),
        (Wishes(sensitivity=False, state=Path("state")), "--calibration-state has what errors"),
        (Wishes(sensitivity=True, fit="reference"), "the fit `hessian`"),
    ):
        with pytest.raises(RecipeError, match=said):
            choose(RECIPE, wishes)


class Elsewhere:
    """A source whose shards are fetched, or lie here."""

    def __init__(self, held: int) -> None:
        self.held = held

    def disk_bytes(self) -> int:
        return self.held


def test_a_source_that_does_not_lie_here_is_not_read_twice_more() -> None:
    here, far = Elsewhere(0), Elsewhere(10**9)
    for asked, expected in ((None, True), (True, True), (False, False)):
        assert OnTheFly(OWN, sensitivity=asked).sensitive(here) == expected  # type: ignore[arg-type]
    for asked in (None, False):
        assert not OnTheFly(OWN, sensitivity=asked).sensitive(far)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="a source that lies here") as refused:
        OnTheFly(OWN, sensitivity=True).sensitive(far)  # type: ignore[arg-type]
    assert "--source" in str(refused.value.hint)


def test_the_file_says_the_effort_that_its_statistics_are() -> None:
    assert effort_of(None) == effort_of(ImatrixFile(FILE)) == "imatrix"
    assert effort_of(OnTheFly()) == effort_of(MomentFolder(FILE)) == "calibrated"
    assert effort_of(NoStatistics()) is None


def test_nobody_asks_for_the_device_where_it_does_not_matter():
    """The answer may take as long as torch takes to load."""

    def device():
        raise AssertionError("asked")

    for wishes in (Wishes("imatrix"), Wishes(imatrix=FILE), Wishes(no_imatrix=True), Wishes(fit="exact")):
        choose(RELEASED, wishes, device)
