"""Costs of errors come from files of sensitivities, each read once while it is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_model
from mq_quant.awq.row_answers import cost_factor, row_answers
from mq_quant.formats.errors import CalibrationError
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.statistics.triangles import pack_moment
from mq_quant.quantize.calibrate.error_costs import ErrorCosts
from mq_quant.quantize.calibrate.sensitivity_files import (
    read_sensitivity,
    sensitivity_file,
    write_sensitivity,
)

CONFIG = parse_config(small_model.CONFIG)
HIDDEN = CONFIG.hidden_size


def found(folder: Path) -> tuple[ErrorCosts, dict[int, str]]:
    hashes = {}
    for layer in range(2):
        g = np.random.default_rng(layer).standard_normal((4 * HIDDEN, HIDDEN)) * np.geomspace(1, 0.1, HIDDEN)
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        hashes[layer] = write_sensitivity(folder, layer, pack_moment(g.T @ g / len(g)), len(g))
    costs = ErrorCosts(CONFIG)
    costs.found(folder, hashes)
    return costs, hashes


def test_nothing_is_known_before_files_are_found() -> None:
    costs = ErrorCosts(replace(CONFIG, num_hidden_layers=1))
    assert costs.factor(0) is None and costs.row_answers(0) is None


def test_each_layer_has_the_costs_of_its_file(tmp_path: Path) -> None:
    costs, hashes = found(tmp_path)
    for layer in range(2):
        want = cost_factor(read_sensitivity(tmp_path, layer, CONFIG, hashes[layer]))
        factor, answers, meant = costs.factor(layer), costs.row_answers(layer), row_answers(want)
        assert want is not None and factor is not None and answers is not None and meant is not None
        np.testing.assert_array_equal(factor, want.astype(np.float32))
        for (rows, share), (expected, wanted) in zip(answers, meant, strict=True):
            assert rows == expected
            np.testing.assert_array_equal(share, wanted)
    first, second = costs.factor(0), costs.factor(1)
    assert first is not None and second is not None and not np.array_equal(first, second)


@pytest.mark.parametrize("wrong", ["gone", "damaged"])
def test_a_file_that_is_not_what_it_was_is_refused(tmp_path: Path, wrong: str) -> None:
    costs, _ = found(tmp_path)
    file = tmp_path / sensitivity_file(1)
    if wrong == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert costs.factor(0) is not None
    with pytest.raises(CalibrationError, match=sensitivity_file(1)):
        costs.row_answers(1)


def test_a_factor_is_read_once_for_rounding_and_tuning(tmp_path: Path) -> None:
    costs, _ = found(tmp_path)
    costs.row_answers(0)
    (tmp_path / sensitivity_file(0)).unlink()
    assert costs.factor(0) is not None
