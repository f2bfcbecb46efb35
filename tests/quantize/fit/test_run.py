"""Measurements: a piece's loss is that of a model with only that piece rounded, and a killed run continues."""

from __future__ import annotations

from collections.abc import Callable

from mq_quant.quantize.fit.run import MeasureResult

Measure = Callable[..., MeasureResult]


def test_it_runs(measured: Measure) -> None:
    for effort in ("imatrix", "calibrated"):
        print(measured(f"{effort}.json", effort=effort).measurement.text_json())
