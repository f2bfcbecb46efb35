"""Files of llama.cpp's --kl-divergence-base, written here as llama.cpp writes them, and its numbers from them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from linear_heads import VOCABULARY
from llama_base_file import LENGTH, ROWS, logits_of, written
from mq_quant.formats.errors import InputError
from mq_quant.verify.evaluate import head
from mq_quant.verify.evaluate.head import judge
from mq_quant.verify.evaluate.llama_base import open_llama_base


def llama_numbers(path: Path, test: object, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """KLD, −ln p of both models and the same top token at each position, in the order of its sums."""
    data, size = path.read_bytes(), 8 + 2 * (VOCABULARY + VOCABULARY % 2)
    at = 20 + 4 * tokens.size
    found: dict[str, list[float]] = {"kld": [], "base": [], "test": [], "same": []}
    for s, ids in enumerate(tokens):
        values = logits_of(test, s).astype(np.float64)
        for position in range(LENGTH // 2, LENGTH - 1):
            row, at = data[at : at + size], at + size
            scale, low = struct.unpack("<ff", row[:8])
            log_p = (np.float32(scale) * np.frombuffer(row[8:], "<u2")[:VOCABULARY] + np.float32(low)).astype(
                float
            )
            log_q = values[position] - np.log(np.exp(values[position]).sum())
            kept = log_p > -16
            found["kld"].append(float((np.exp(log_p[kept]) * (log_p - log_q)[kept]).sum()))
            found["base"].append(-log_p[ids[position + 1]])
            found["test"].append(-log_q[ids[position + 1]])
            found["same"].append(float(log_p.argmax() == log_q.argmax()))
    return {key: np.array(value) for key, value in found.items()}


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_figures_are_llama_cpps(scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many tokens are under its floor of e^-16."""
    monkeypatch.setattr(head, "ROWS", 20)
    path, test, tokens = written(tmp_path / "base", scale)
    base = open_llama_base(path)
    (found,) = judge(base.comparison(1), [test])  # type: ignore[list-item]
    expected = llama_numbers(path, test, tokens)
    np.testing.assert_allclose(found.kld, expected["kld"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.nll_reference, expected["base"], rtol=1e-6)
    np.testing.assert_allclose(found.nll_test, expected["test"], rtol=1e-5)
    np.testing.assert_array_equal(found.top1, expected["same"].astype(bool))
    assert len(found.kld) == 3 * ROWS


def test_a_text_that_begins_with_a_bos_has_one_before_each_chunk(tmp_path: Path) -> None:
    path, _, tokens = written(tmp_path / "base", 1.0)
    base = open_llama_base(path)
    begun = base.begun_with(int(tokens[0, 0]))
    assert (begun[:, 0] == tokens[0, 0]).all() and (begun[:, 1:] == tokens[:, 1:]).all()
    for other in (None, int(tokens[0, 0]) + 1):
        np.testing.assert_array_equal(base.begun_with(other), tokens)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, b"_logitz_", "does not begin with _logits_"),
        (8, struct.pack("<i", -5), "n_ctx -5"),
        (12, struct.pack("<i", VOCABULARY + 2), "what it states takes"),
        (16, struct.pack("<i", 2), "what it states takes"),
        (20, struct.pack("<i", VOCABULARY), "outside its vocabulary"),
        (20 + 4 * 33, struct.pack("<f", float("nan")), "log-probabilities are none"),
        (20 + 4 * 33, struct.pack("<f", 1e30), "log-probabilities are none"),
        (24 + 4 * 33, struct.pack("<f", 3.0), "log-probabilities are none"),
    ],
)
def test_broken_files_are_refused(at: int, value: bytes, text: str, tmp_path: Path) -> None:
    path, _, _ = written(tmp_path / "base", 1.0)
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(InputError, match=text):
        open_llama_base(path)


@pytest.mark.parametrize("size", [0, 8, 19, 100, 1000])
def test_a_file_that_ends_too_early_is_refused(size: int, tmp_path: Path) -> None:
    path, _, _ = written(tmp_path / "base", 1.0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="kl-divergence-base"):
        open_llama_base(path)
