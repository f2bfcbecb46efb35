"""Measuring and budgets from Python: the same as on the command line, with the same refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mq_quant as mq
import numpy as np
import pytest
from mq_quant.quantize.fit.measurement import read_measurement
from mq_quant.quantize.pipeline.statistics import NoStatistics

IDS = np.random.default_rng(0).integers(0, 300, (6, 24))


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="module")
def measured(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "m.json"
    given: dict[str, Any] = {"effort": "imatrix", "statistics": small / "imatrix.gguf", "jobs": 2}
    result = mq.measure_model(small, path, tokens=IDS, held_out=2, **given)
    assert result.path == path and result.measurement == read_measurement(path)
    assert result.measurement.text.tokens == 48 and result.measurement.imatrix
    return path


def test_a_file_of_a_size_is_built_by_what_was_measured(small: Path, measured: Path, tmp_path: Path) -> None:
    made = mq.build_fitted(
        tmp_path / "out",
        size="1.2MB",
        source=small,
        measurement=measured,
        statistics=small / "imatrix.gguf",
        jobs=2,
    )
    assert made.result.total_bytes == (tmp_path / "out").stat().st_size <= 1_200_000
    assert made.fitted.recipe.effort == "imatrix" and made.fitted.expected_kld is not None
    assert "on 48 tokens only" in made.notes[0]
    recipe = mq.fit_recipe(size="1.2MB", source=small, measurement=measured)
    assert recipe.rules == made.fitted.recipe.rules


def test_tokens_of_ones_own_are_judged_and_calibrated_on(small: Path, tmp_path: Path) -> None:
    result = mq.measure_model(
        small, tmp_path / "m.json", tokens=IDS, judge_tokens=IDS[:3], held_out=1, jobs=2
    )
    assert result.measurement.calibration is not None
    assert (result.measurement.calibration.tokens, result.measurement.text.tokens) == (IDS.size, 24)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": IDS + 300}, "tokens"),
        ({"judge_tokens": IDS + 300}, "judge_tokens"),
        ({"tokens": IDS, "length": 8}, "leave sequences and length out"),
        ({"tokens": IDS, "sequences": 6}, "leave sequences and length out"),
        ({"tokens": IDS, "held_out": 6}, "6 sequences are too few"),
        ({"tokens": IDS, "judge_tokens": IDS[:2], "held_out": 3}, "judge_tokens: has 2 sequences"),
        ({"tokens": IDS, "statistics": "no/such/imatrix"}, "no/such/imatrix"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    given: dict[str, Any], said: str, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(mq.MqError) as e:
        mq.measure_model(small, tmp_path / "m.json", jobs=1, **given)
    assert said in str(e.value)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_built_is_refused(small: Path, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(mq.MqError, match="no budget was given"):
        mq.build_fitted(out, source=small)
    with pytest.raises(mq.MqError, match="all say how large"):
        mq.fit_recipe(size="1MB", bits=3, source=small)
    with pytest.raises(mq.MqError, match="is of another model"):
        mq.build_fitted(out, size="13MB", source="tiny", measurement=measured)
    with pytest.raises(mq.MqError, match="a build without importances loses elsewhere"):
        mq.build_fitted(out, size="1.2MB", source=small, measurement=measured, statistics=NoStatistics())
    assert not list(tmp_path.iterdir())
