"""From imatrix statistics to importances: broken entries first, then shrinkage toward the layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mq_quant.awq.from_imatrix import IMATRIX_PRIOR, load_importance, repair
from mq_quant.awq.importance import Importance
from mq_quant.formats.errors import ImatrixError
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.statistics.imatrix import ImatrixEntry, read_imatrix, write_imatrix
from mq_quant.lloyd.hessian.row import from_weights

CONFIG = parse_config(small_model.CONFIG)
NAMES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
BROKEN = [np.nan, np.inf, -np.inf, -1.0]


def energies(experts: int = 4, width: int = 256, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, 1.5, (experts, width))).astype(np.float32)


def imatrix(path: Path, entries: dict[str, ImatrixEntry]) -> Path:
    complete = {
        f"blk.{layer}.{n}.weight": ImatrixEntry(energies(3, seed=layer), np.full(3, 100.0))
        for layer in range(2)
        for n in NAMES
    }
    write_imatrix(path, complete | entries, ["text"], 1, 512)
    return path


@pytest.mark.parametrize("bad", BROKEN)
def test_a_broken_entry_takes_the_mean_of_healthy_experts_and_is_reported(bad: float) -> None:
    d, n = energies(), np.float64([100, 50, 0, 10])
    d[1, 7] = bad
    out, counts, notes = repair(d, n, "layer 61 w2")
    np.testing.assert_array_equal(counts, n)
    healthy = (100 * float(d[0, 7]) + 10 * float(d[3, 7])) / 110
    assert out[1, 7] == pytest.approx(healthy)
    assert any(note.startswith("layer 61 w2: 1 ") and "experts 1 " in note for note in notes)
    whole = energies()
    want, _, _ = repair(whole, n, "layer 61 w2")
    np.testing.assert_array_equal(np.delete(out, 7, axis=1), np.delete(want, 7, axis=1))


def test_entries_of_experts_without_tokens_are_not_called_broken() -> None:
    d = energies()
    d[2] = np.nan
    out, _, notes = repair(d, np.float64([100, 50, 0, 10]), "layer 0 w1")
    assert notes == ["layer 0 w1: 1 experts without tokens took the layer's mean"]
    assert np.isfinite(out).all()
    shared = (d[[0, 1, 3]].astype(np.float64) * [[100], [50], [10]]).sum(axis=0) / 160
    np.testing.assert_allclose(out[2], shared)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (np.zeros((3, 256)), np.full(3, 9.0)),
        (np.full((3, 256), np.nan), np.full(3, 9.0)),
        (np.full((3, 256), -1.0), np.full(3, 9.0)),
        (np.ones((3, 256)), np.zeros(3)),
        (np.ones((3, 256)), np.full(3, np.nan)),
        (np.ones((3, 256)), np.array([-5.0, np.inf, 0.0])),
    ],
    ids=["zeros", "NaN", "negative", "no tokens", "NaN tokens", "impossible tokens"],
)
def test_nothing_usable_is_an_error_that_names_the_place(values: np.ndarray, counts: np.ndarray) -> None:
    with pytest.raises(ImatrixError, match="layer 3 w2 has no usable value"):
        repair(values.astype(np.float32), counts, "layer 3 w2")


def test_a_channel_that_no_expert_knows_takes_the_mean_channel() -> None:
    d = np.tile(np.arange(1.0, 257.0), (3, 1)).astype(np.float32)
    d[:, 9] = np.inf
    out, _, notes = repair(d, np.full(3, 50.0), "layer 0 w1")
    np.testing.assert_allclose(out[:, 9], np.delete(d[0], 9).mean())
    assert "3 non-finite" in notes[0]


@given(
    hnp.arrays(np.float32, (5, 8), elements=st.floats(width=32)),
    hnp.arrays(np.float64, 5, elements=st.floats(allow_nan=True)),
)
def test_anything_becomes_usable_or_an_error(d: np.ndarray, n: np.ndarray) -> None:
    n = np.clip(n, -1e9, 1e9)
    try:
        out, counts, _ = repair(d, n, "x")
    except ImatrixError:
        return
    assert np.isfinite(out).all() and (out >= 0).all() and (out > 0).any()
    assert np.isfinite(counts).all() and (counts >= 0).all()
    h = from_weights(np.tile(Importance(out[0]).channel_weights(), 32))
    assert np.isfinite(h.groups[0].matrix).all() and np.isfinite(h.groups[0].feedback).all()


def test_shrinkage_by_count() -> None:
    d, n = energies().astype(np.float64), np.float64([1000, 32, 1, 0])
    out, _, notes = repair(d.astype(np.float32), n, "x")
    shared = (d * n[:, None]).sum(axis=0) / n.sum()
    for e in range(4):
        np.testing.assert_allclose(
            out[e], (n[e] * d[e] + IMATRIX_PRIOR * shared) / (n[e] + IMATRIX_PRIOR), rtol=1e-6
        )
    assert len(notes) == 1


def test_healthy_statistics_are_not_touched_by_notes() -> None:
    _, _, notes = repair(energies(), np.full(4, 100.0), "x")
    assert notes == []


def test_the_notes_of_many_experts_stay_short() -> None:
    d = energies(40)
    d[:, 0] = np.nan
    d[0, 0] = 1
    _, _, notes = repair(d, np.full(40, 9.0), "x")
    assert "39 non-finite" in notes[0] and "experts 1, 2, 3, 4, 5, 6, 7, 8, … took" in notes[0]


def test_inputs_are_left_alone() -> None:
    d, n = energies(), np.float64([5, 0, 7, 9])
    d[0, 0] = np.inf
    before = d.copy(), n.copy()
    repair(d, n, "x")
    np.testing.assert_array_equal(d, before[0])
    np.testing.assert_array_equal(n, before[1])


def test_an_imatrix_is_read_layer_by_layer_with_its_faults(tmp_path: Path) -> None:
    broken = energies(3)
    broken[2, 5] = np.inf
    entries = {"blk.1.ffn_down_exps.weight": ImatrixEntry(broken, np.float64([90, 0, 80]))}
    importance = load_importance(read_imatrix(imatrix(tmp_path / "i.gguf", entries)), CONFIG)
    assert importance.coverage == importance.record()["coverage"] == pytest.approx(17 / 18)
    assert importance.layer(0).notes == ()
    layer = importance.layer(1)
    assert len(layer.notes) == 2 and all(f.startswith("layer 1 w2: ") for f in layer.notes)
    one = layer.of(1, "w2")
    assert one.count == 0 and one.moment is None and one.diagonal.shape == (256,)
    assert np.isfinite(one.diagonal).all()
    np.testing.assert_allclose(
        importance.layer(0).of(2, "w1").diagonal.mean(), energies(3)[2].mean(), rtol=0.5
    )


def test_energy_at_gate_and_up_is_the_sum_over_experts(tmp_path: Path) -> None:
    layer = load_importance(read_imatrix(imatrix(tmp_path / "i.gguf", {})), CONFIG).layer(0)
    want = sum(layer.of(e, p).diagonal * layer.of(e, p).count for e in range(3) for p in ("w1", "w3"))
    np.testing.assert_allclose(layer.gate_up_energy(), want)
    np.testing.assert_allclose(want, 200 * energies(3).astype(np.float64).sum(axis=0), rtol=0.01)


@pytest.mark.parametrize(
    "entry",
    [
        ImatrixEntry(np.zeros((3, 256), np.float32), np.full(3, 9.0)),
        ImatrixEntry(np.full((3, 256), np.nan, np.float32), np.full(3, 9.0)),
        ImatrixEntry(energies(3), np.zeros(3)),
        ImatrixEntry(energies(3, 512), np.full(3, 9.0)),
        ImatrixEntry(energies(2), np.full(2, 9.0)),
    ],
    ids=["zeros", "NaN", "no tokens", "wrong K", "wrong expert count"],
)
def test_an_imatrix_that_cannot_serve_is_refused_before_any_work(tmp_path: Path, entry: ImatrixEntry) -> None:
    with np.errstate(invalid="ignore"):
        path = imatrix(tmp_path / "i.gguf", {"blk.1.ffn_down_exps.weight": entry})
    with pytest.raises(ImatrixError, match=r"blk\.1\.ffn_down_exps"):
        load_importance(read_imatrix(path), CONFIG)
