"""A measurement speaks of builds of its own effort, and says where what is expected may be off."""

from __future__ import annotations

from typing import Any

import pytest
from measurement_document import document
from mq_quant.formats.errors import MeasurementError
from mq_quant.formats.hfq.provenance import KEY, Provenance
from mq_quant.quantize.fit.matching import check_effort, reservations
from mq_quant.quantize.fit.measurement import Measurement
from mq_quant.quantize.spec.recipe import Effort


def measurement(**changes: Any) -> Measurement:
    return Measurement.model_validate(document(**changes))


def made(sequences: Any = 128, imatrix: str | None = None) -> Provenance:
    """What a build on sequences of 512 tokens, or under an imatrix, says of itself."""
    calibration = {"sha256": "0" * 64, "tokens": {"sequences": sequences, "length": 512, "sha256": "1" * 64}}
    said: dict[str, Any] = {"sha256": imatrix}
    return Provenance.read({KEY: {"imatrix": said} if imatrix else {"calibration": calibration}})


@pytest.mark.parametrize(
    ("measured", "built"), [("imatrix", "imatrix"), ("calibrated", "calibrated"), ("calibrated", "tuned")]
)
def test_builds_of_its_effort_are_let_through(measured: str, built: Effort) -> None:
    check_effort(measurement(effort=measured), built)


@pytest.mark.parametrize(
    ("measured", "built"),
    [
        ("imatrix", "calibrated"),
        ("imatrix", "tuned"),
        ("calibrated", "imatrix"),
        ("calibrated", None),
        ("imatrix", None),
    ],
)
def test_others_are_refused_with_both_ways_out(measured: str, built: Effort | None) -> None:
    with pytest.raises(MeasurementError, match=f"is of effort {measured}") as e:
        check_effort(measurement(effort=measured), built)
    hint = e.value.hint or ""
    assert f"build with --effort {measured}" in hint and "measure with" in hint and "tuned" not in hint


TOKENS = {"tokens": 65536, "sha256": "5" * 64}


@pytest.mark.parametrize(
    ("sequences", "said"),
    [
        (128, ""),
        (65, ""),
        (255, ""),
        (64, "its KLD will be higher than expected"),
        (1024, "65,536 tokens, and this build is on 524,288: its KLD will be lower"),
        ("128", ""),
    ],
)
def test_calibrations_of_other_lengths_are_told(sequences: Any, said: str) -> None:
    found = list(reservations(measurement(calibration=TOKENS), made(sequences)))
    assert said in found[0] if said else not found


def test_what_an_older_measurement_does_not_say_is_not_held_against_it() -> None:
    assert not list(reservations(measurement(), made(1)))
    assert not list(reservations(measurement(effort="imatrix"), made(imatrix="4" * 64)))


def test_another_imatrix_and_few_tokens_are_told() -> None:
    under = measurement(effort="imatrix", imatrix="6" * 64)
    assert not list(reservations(under, made(imatrix="6" * 64)))
    assert "another imatrix" in next(reservations(under, made(imatrix="7" * 64)))
    few = measurement(text={"tokens": 128, "sha256": "3" * 64})
    assert "on 128 tokens only" in next(reservations(few))
