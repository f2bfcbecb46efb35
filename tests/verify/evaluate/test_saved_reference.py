"""Saved predictions: within f16 of the source that they are of, and refused where they are not whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from linear_heads import VOCABULARY, heads
from mq_quant.formats.errors import CheckError, InputError
from mq_quant.quantize.write.atomic import write_atomic
from mq_quant.verify.evaluate import head, saved_reference
from mq_quant.verify.evaluate.dense import of_source
from mq_quant.verify.evaluate.head import judge
from mq_quant.verify.evaluate.saved_reference import encode_reference, open_reference, reference_bytes


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (head, saved_reference):
        monkeypatch.setattr(module, "ROWS", 40)
    reference, test, tokens = heads()
    comparison = of_source(reference, tokens, VOCABULARY, 1)
    judge(comparison, [test])
    pieces = encode_reference(reference, comparison.totals, tokens, VOCABULARY, {"text": "abc"})
    write_atomic(tmp_path / "reference", pieces)
    return tmp_path / "reference"


def test_figures_are_those_of_the_source(saved: Path) -> None:
    reference, test, tokens = heads()
    opened = open_reference(saved)
    assert opened.vocabulary == VOCABULARY and opened.record["text"] == "abc"
    np.testing.assert_array_equal(opened.tokens, tokens)
    (found,) = judge(of_source(opened, opened.tokens, VOCABULARY, 1), [test])
    (exact,) = judge(of_source(reference, tokens, VOCABULARY, 1), [test])
    assert found.kld.mean() == pytest.approx(exact.kld.mean(), rel=5e-4)
    np.testing.assert_allclose(found.kld, exact.kld, atol=1e-3)
    np.testing.assert_allclose(found.nll_reference, exact.nll_reference, atol=5e-3)
    np.testing.assert_array_equal(found.nll_test, exact.nll_test)
    assert saved.stat().st_size - reference_bytes(tokens.size, VOCABULARY) < 1000


def test_a_safetensors_reader_reads_it(saved: Path) -> None:
    from safetensors import safe_open

    with safe_open(saved, "np") as f:
        values = np.concatenate([f.get_tensor(n) for n in sorted(f.keys()) if n != "tokens"], axis=1)
        assert "mq_quant_reference" in f.metadata()
    np.testing.assert_allclose(np.exp(values.astype(float)).sum(-1), 1, atol=2e-3)


@pytest.mark.parametrize("size", [0, 4, 9, 100, 2000])
def test_a_file_that_ends_too_early_is_refused(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(InputError, match="holds no saved predictions"):
        open_reference(saved)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (b"mq_quant_reference", b"mq_quant_referencf", "no saved predictions of this version"),
        (b'\\"schema\\":1', b'\\"schema\\":7', "no saved predictions of this version"),
        (b'"tokens"', b'"tokenz"', "no token ids"),
        (b"log_probs.000000040", b"log_probs.000000041", "do not follow each other"),
    ],
)
def test_other_contents_are_refused(saved: Path, old: bytes, new: bytes, text: str) -> None:
    data = saved.read_bytes()
    assert old in data and len(old) == len(new)
    saved.write_bytes(data.replace(old, new))
    with pytest.raises(InputError, match=text):
        open_reference(saved)


def test_ids_outside_the_vocabulary_are_refused(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 4] = (VOCABULARY).to_bytes(4, "little")
    saved.write_bytes(data)
    with pytest.raises(InputError, match="outside its vocabulary"):
        open_reference(saved)


def test_a_file_that_changes_while_it_is_used_is_refused(saved: Path) -> None:
    opened = open_reference(saved)
    saved.write_bytes(saved.read_bytes()[:-10])
    opened.load(0, 40)
    with pytest.raises(InputError, match="changed after"):
        opened.logits(0, range(11))


def test_a_source_that_gives_no_numbers_is_not_saved(saved: Path) -> None:
    reference, test, tokens = heads()
    comparison = of_source(reference, tokens, VOCABULARY, 1)
    judge(comparison, [test])
    reference.model.rows[3] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(CheckError, match="not numbers"):
        list(encode_reference(reference, comparison.totals, tokens, VOCABULARY, {}))
