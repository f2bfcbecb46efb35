"""A file of what one layer's experts saw: each expert gets the rows of its own tokens, and damage is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_model
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import CalibrationError
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.statistics.moment_file import encode_layer
from mq_quant.formats.statistics.row_file import NOBODY, open_rows, row_file, row_tensors

CONFIG = parse_config(small_model.CONFIG)
EXPERTS, TAKEN = CONFIG.num_local_experts, CONFIG.num_experts_per_tok


def write(path: Path, inputs: np.ndarray, experts: np.ndarray) -> None:
    path.write_bytes(b"".join(encode_layer({"inputs": inputs, "experts": experts})))


def routed(tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs f32 [tokens, hidden] and, for each token, different experts i64 [tokens, k]."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((tokens, CONFIG.hidden_size)).astype(np.float32)
    experts = np.argsort(random.random((tokens, EXPERTS)), axis=1)[:, :TAKEN].astype(np.int64)
    return inputs, experts


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_each_expert_gets_the_rows_of_its_tokens_in_order(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / row_file(3)
    inputs, experts = routed(tokens, seed)
    experts[np.random.default_rng(seed).random(tokens) < 0.2] = NOBODY
    write(path, inputs, experts)
    rows = open_rows(path, CONFIG, tokens)
    for expert in range(EXPERTS):
        expected = np.flatnonzero((experts == expert).any(axis=1))
        np.testing.assert_array_equal(rows.tokens(expert), expected)
        np.testing.assert_array_equal(rows.of(expert), inputs[expected])


def test_its_tensors_are_what_their_sizes_are_planned_by(tmp_path: Path) -> None:
    write(tmp_path / "rows", *routed(7, 1))
    assert row_tensors(CONFIG, 7) == {
        "inputs": ("F32", (7, CONFIG.hidden_size)),
        "experts": ("I64", (7, TAKEN)),
    }
    size = 7 * (4 * CONFIG.hidden_size + 8 * TAKEN)
    assert size < (tmp_path / "rows").stat().st_size < size + 256


def test_rows_of_another_number_of_tokens_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows", *routed(7, 1))
    with pytest.raises(CalibrationError, match=r"the manifest calls for I64 \[8"):
        open_rows(tmp_path / "rows", CONFIG, 8)


def test_a_file_that_changes_while_it_is_open_is_told(tmp_path: Path) -> None:
    inputs, experts = routed(7, 1)
    write(tmp_path / "rows", inputs, experts)
    rows = open_rows(tmp_path / "rows", CONFIG, 7)
    (tmp_path / "rows").unlink()
    write(tmp_path / "rows", inputs + 1, experts)
    with pytest.raises(CalibrationError):
        rows.of(int(experts[0, 0]))
