"""Measurements of the smallest checkpoint, on one thread of torch, since the work is so small."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.fit.before import texts_of
from mq_quant.quantize.fit.run import MeasureOptions, MeasureResult, measure
from mq_quant.quantize.pipeline.statistics import ImatrixFile, OnTheFly, Statistics
from mq_quant.quantize.spec.places import choose_recipe, open_place

Measure = Callable[..., MeasureResult]


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (10, 24)))
    return path


@pytest.fixture
def measured(small: Path, tokens: Path, tmp_path: Path) -> Measure:
    """Measure the small checkpoint: measured("m.json", effort="calibrated", held_out=4, source=…, watch=…, …)."""

    def run(
        name: str = "m.json",
        effort: str = "imatrix",
        held_out: int = 4,
        source: Path | str = small,
        statistics: Statistics | None = None,
        **given: Any,
    ) -> MeasureResult:
        recipe = choose_recipe("mq4", None, str(source))
        recipe = recipe.model_copy(update={"awq": recipe.awq.model_copy(update={"alpha": 0.3})})
        if statistics is None:
            statistics = OnTheFly() if effort == "calibrated" else ImatrixFile(small / "imatrix.gguf")
        with closing(open_place(str(source), None, 4, tmp_path)) as opened:
            opened.validate()
            request = TokenRequest(tokens=tokens)
            texts = texts_of(opened, request, None, held_out, effort == "calibrated")
            return measure(recipe, opened, texts, statistics, MeasureOptions(tmp_path / name, **given))

    return run
