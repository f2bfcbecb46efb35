"""Moments of too few tokens: what they lean on, from which count they stand alone, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calibration_fixtures import CONFIG, COUNTS, SOURCE, moment_of, set_key, write
from mq_quant.awq.few_tokens import BACKING_PRIOR, backed_gate_up, limit, on_correlations, shrunk, thin_notes
from mq_quant.awq.from_imatrix import ImatrixLayer, load_importance
from mq_quant.awq.from_moments import MOMENT_PRIOR, CalibratedLayer, load_calibration
from mq_quant.awq.importance import Importance
from mq_quant.formats.statistics.imatrix import read_imatrix
from small_imatrix import save_imatrix


def energies(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=shape))


def from_imatrix(counts: tuple[float, ...] = (10.0, 30.0)) -> ImatrixLayer:
    shapes = {"w1": 4, "w2": 6, "w3": 4}
    diagonals = {p: energies(i, (len(counts), k)) for i, (p, k) in enumerate(shapes.items())}
    diagonals["w3"] = diagonals["w1"]
    return ImatrixLayer(3, diagonals, dict.fromkeys(shapes, np.array(counts)), ("imatrix repaired",))


def test_a_moment_on_the_layers_correlations_has_the_experts_own_energies() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) @ np.random.default_rng(1).normal(size=(6, 6))
    pooled, d = x.T @ x / 50, energies(2, (6,))
    got = on_correlations(pooled, d)
    np.testing.assert_array_equal(np.diag(got), d)
    np.testing.assert_array_equal(got, got.T)
    root = np.sqrt(np.diag(pooled))
    np.testing.assert_allclose(
        got / np.sqrt(np.outer(d, d)), pooled / np.outer(root, root), rtol=1e-12, atol=1e-12
    )
    assert np.linalg.eigvalsh(got).min() > 0
    np.testing.assert_allclose(on_correlations(pooled, np.diag(pooled)), pooled, rtol=1e-12)


def test_channels_that_are_silent_in_the_layer_or_the_imatrix_correlate_with_nothing() -> None:
    pooled = np.full((3, 3), 2.0)
    pooled[1] = pooled[:, 1] = 0
    np.testing.assert_array_equal(
        on_correlations(pooled, np.array([2.0, 5.0, 0.0])), np.diag([2.0, 5.0, 0.0])
    )


def test_a_thin_gate_up_moment_leans_on_the_imatrix_by_its_tokens() -> None:
    imatrix, own = from_imatrix(), np.full((4, 4), 0.5) + np.eye(4)
    mean = (imatrix.diagonals["w1"] * np.array([[10.0], [30.0]])).sum(0) / 40
    for count in (0.0, BACKING_PRIOR, 1e12):
        got = backed_gate_up(Importance(np.diag(own).copy(), own, count), imatrix)
        want = (count * own + BACKING_PRIOR * np.diag(mean)) / (count + BACKING_PRIOR)
        assert got.moment is not None and got.count == count
        np.testing.assert_allclose(got.moment, want, rtol=1e-12)
        np.testing.assert_array_equal(got.diagonal, np.diag(got.moment))


def test_an_imatrix_without_counts_still_serves() -> None:
    silent = from_imatrix((0.0, 0.0))
    got = backed_gate_up(Importance(np.ones(4), np.eye(4), 0.0), silent)
    np.testing.assert_allclose(got.diagonal, silent.diagonals["w1"].mean(0), rtol=1e-12)


def test_notes_name_what_leans_on_the_imatrix() -> None:
    enough = np.array([24.0, 99.0])
    assert limit(6) == 24 and list(thin_notes(2, 16, 4, enough, 6)) == []
    (gate,) = thin_notes(2, 15, 4, enough, 6)
    assert gate == "layer 2 w1, w3: 15 tokens, fewer than 16: imatrix behind them"
    (down,) = thin_notes(2, 16, 4, np.array([23.0, 24.0, 0.0]), 6)
    assert (
        down
        == "layer 2 w2: experts 0, 2 (2) with fewer than 24 tokens, 1 of them with none: imatrix behind them"
    )
    (many,) = thin_notes(2, 16, 4, np.zeros(9), 6)
    assert "experts 0, 1, 2, 3, 4, 5, 6, 7, … (9)" in many


@pytest.fixture(scope="module")
def layers(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[CalibratedLayer, CalibratedLayer, ImatrixLayer]:
    """Layer 0 of a folder where expert 0 has enough tokens: alone, with an imatrix behind it, and that imatrix."""
    scratch = tmp_path_factory.mktemp("thin")
    folder = write(scratch / "calib", change=set_key("layers", 0, "notes", ["something was left out"]))
    save_imatrix(scratch / "imatrix.gguf")
    imatrix = load_importance(read_imatrix(scratch / "imatrix.gguf"), CONFIG)
    alone, backed = (load_calibration(folder, CONFIG, SOURCE, given) for given in (None, imatrix))
    return alone.layer(0), backed.layer(0), imatrix.layer(0)


Layers = tuple[CalibratedLayer, CalibratedLayer, ImatrixLayer]


def test_experts_of_few_tokens_are_shrunk_toward_their_own_energies(layers: Layers) -> None:
    _, backed, imatrix = layers
    assert max(COUNTS[0]) < limit(256)
    for e, n in enumerate(COUNTS[0]):
        prior = on_correlations(moment_of(50), imatrix.of(e, "w2").diagonal)
        want = shrunk(moment_of(e), n, prior, MOMENT_PRIOR) if n else prior
        got = backed.of(e, "w2")
        assert got.moment is not None and got.count == n
        np.testing.assert_allclose(got.moment, want, rtol=1e-12)


def test_experts_of_enough_tokens_stand_alone(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, backed, _ = layers
    monkeypatch.setattr("mq_quant.awq.few_tokens.TOKENS_PER_CHANNEL", 1)
    assert COUNTS[0].tolist() == [700, 0, 90]
    for e, same in ((0, True), (1, False), (2, False)):
        a, b = alone.of(e, "w2").moment, backed.of(e, "w2").moment
        assert a is not None and b is not None and (a == b).all() == same


def test_a_layer_of_few_tokens_takes_its_scale_from_the_imatrix(layers: Layers) -> None:
    alone, backed, imatrix = layers
    np.testing.assert_array_equal(backed.gate_up_energy(), imatrix.gate_up_energy())
    assert (backed.gate_up_energy() != alone.gate_up_energy()).any()
    for p in ("w1", "w3"):
        assert backed.of(2, p) is backed.of(0, "w1") and backed.of(0, p).count == 395


def test_what_leans_on_the_imatrix_is_said(layers: Layers) -> None:
    alone, backed, imatrix = layers
    assert alone.notes[0] == backed.notes[0] == "something was left out"
    assert not any("imatrix" in note for note in alone.notes)
    assert backed.notes[1:] == (
        *thin_notes(0, 395, 256, COUNTS[0].astype(float), 256),
        *imatrix.notes,
    )


def test_a_pooled_folder_leans_on_it_too(tmp_path: Path) -> None:
    save_imatrix(tmp_path / "imatrix.gguf")
    imatrix = load_importance(read_imatrix(tmp_path / "imatrix.gguf"), CONFIG)
    layer = load_calibration(write(tmp_path / "pooled", "pooled"), CONFIG, SOURCE, imatrix).layer(0)
    for e in range(3):
        np.testing.assert_array_equal(layer.of(e, "w2").diagonal, imatrix.layer(0).of(e, "w2").diagonal)
