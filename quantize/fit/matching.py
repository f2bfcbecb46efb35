"""Whether a measurement speaks of a build: what pieces lose follows how they are rounded, so both are of one effort."""

from __future__ import annotations

from collections.abc import Iterator

from ...formats.errors import MeasurementError
from ...formats.hfq.provenance import Provenance
from ...verify.model.metrics import FEWEST
from ..spec.recipe import Effort
from .measurement import Measurement

APART = 2
"""Calibrations of so many times more or fewer tokens give other losses."""


def check_effort(measurement: Measurement, effort: Effort | None) -> None:
    """MeasurementError where a build of this effort (None: without importances) rounds pieces otherwise than they were
    measured. A tuned build rounds them as a calibrated one.

    Formats that were chosen by what the other effort loses lost up to 58 % more than those chosen by their own
    (docs/fit.md).
    """
    rounded = "calibrated" if effort == "tuned" else effort
    if rounded != measurement.effort:
        build = "a build without importances" if effort is None else f"a build of effort {effort}"
        raise MeasurementError(
            f"the measurement of {measurement.model.name} is of effort {measurement.effort}, and {build} loses "
            "elsewhere",
            hint=f"build with --effort {measurement.effort}, or measure with "
            + (f"--effort {rounded}" if rounded else "the effort of the build"),
        )


def reservations(measurement: Measurement, made: Provenance | None = None) -> Iterator[str]:
    """Sentences on why what is expected may be off, though the choice holds: of the measurement alone, and beside a
    build that is `made` of these inputs.
    """
    if measurement.text.tokens < FEWEST:
        yield (
            f"the measurement compared predictions on {measurement.text.tokens} tokens only, too few for firm losses: "
            f"{FEWEST} and more are better"
        )
    if made is None:
        return
    there, here = measurement.calibration, made.calibration_tokens
    if there is not None and here is not None and not 1 / APART < there.tokens / here < APART:
        yield (
            f"the measurement was calibrated on {there.tokens:,} tokens, and this build is on {here:,}: its KLD will "
            f"be {'lower' if here > there.tokens else 'higher'} than expected"
        )
    imatrix = made.imatrix.sha256 if made.imatrix else None
    if measurement.effort == "imatrix" and measurement.imatrix and imatrix and measurement.imatrix != imatrix:
        yield "the measurement was made under another imatrix than this build: its KLD may differ from what is expected"
