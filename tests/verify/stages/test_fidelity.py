"""Fidelity: energies of known errors, importance with holes, the fold of down, and nothing seen is nothing passed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.hfq.stored import recovered_fold
from mq_quant.formats.minimax import expert_name, inventory
from mq_quant.formats.statistics.imatrix import ImatrixEntry, read_imatrix, write_imatrix
from mq_quant.verify.stages.fidelity import ChannelImportance, check_fidelity, measure
from plainfile import Build, Tensors, by_name, encode

RNG = np.random.default_rng(5)
W = RNG.standard_normal((40, 256)).astype(np.float32)


def test_measure_weighs_channels() -> None:
    noisy = W.copy()
    noisy[:, 0] += 1
    d = np.ones(256, np.float32)
    plain = measure(W, noisy, None)
    assert plain.noise == pytest.approx(40, rel=1e-5)
    assert measure(W, noisy, d).output_snr == pytest.approx(plain.snr)
    d[0] = 0
    assert measure(W, noisy, d).output_snr == 200
    d[:] = 0
    d[0] = 1
    alone = 10 * np.log10((W[:, 0].astype(np.float64) ** 2).sum() / 40)
    assert measure(W, noisy, d).output_snr == pytest.approx(alone, rel=1e-5)


def test_slope_shows_a_scale_and_a_swap() -> None:
    assert measure(W, W, None).slope == 1
    assert measure(W, W * np.float32(1.5), None).slope == pytest.approx(1.5)
    assert abs(measure(W, np.ascontiguousarray(W[::-1]), None).slope) < 0.05
    assert measure(W * 0, W * 0, None).slope == 1
    assert measure(W * 0, W, None).slope == float("inf")


def test_large_tensors_are_measured_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from mq_quant.verify.stages import fidelity

    whole = measure(W, W + np.float32(0.1), None)
    monkeypatch.setattr(fidelity, "ROWS", 700)
    assert measure(W, W + np.float32(0.1), None).snr == pytest.approx(whole.snr)


def test_importance_fills_holes_from_the_layer(checkpoint: Checkpoint, tmp_path: Any) -> None:
    cfg = checkpoint.config
    mean = np.full((cfg.num_local_experts, cfg.hidden_size), 2.0, np.float32)
    mean[0, 3], mean[1], mean[2, 5] = np.inf, 0, np.nan
    mean[3] = 8
    entry = ImatrixEntry(mean, np.full(cfg.num_local_experts, 4.0))
    write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_gate_exps.weight": entry}, ("t",), 1, 4)
    importance = ChannelImportance(read_imatrix(tmp_path / "i.gguf"), cfg)
    specs = {spec.name: spec for spec in inventory(cfg)}
    for expert in (0, 1, 2, 3):
        d = importance.of(specs[expert_name(0, expert, "w1")])
        assert d is not None and np.isfinite(d).all() and (d > 0).all()
        assert d[0] == (8 if expert == 3 else pytest.approx(28 / 11) if expert == 1 else 2)
    assert importance.of(specs[expert_name(0, 0, "w2")]) is None
    assert importance.of(specs["lm_head.weight"]) is None


def test_a_folded_scale_is_recovered_and_undone(build: Build, checkpoint: Checkpoint) -> None:
    """Rows of w3 divided and columns of w2 multiplied by powers of two leave every expert's output as it was."""
    fold = np.exp2(RNG.integers(-1, 2, checkpoint.config.intermediate_size)).astype(np.float32)
    np.testing.assert_array_equal(recovered_fold(W, W / fold[:40, None] * np.float32(1.2)), fold[:40])
    cfg = checkpoint.config

    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        metadata["mq_quant"]["recipe"] = {"awq": {"fold_down": 0.5}}
        found = by_name(tensors)
        scale = (
            found["model.layers.0.block_sparse_moe.awq_scale_gate_up.weight"].view("<f2").astype(np.float32)
        )
        for e in range(cfg.num_local_experts):
            up, down = expert_name(0, e, "w3"), expert_name(0, e, "w2")
            found[up][:] = encode(checkpoint.weight(up) / fold[:, None] * scale, BY_NAME["MQ4"])
            found[down][:] = encode(checkpoint.weight(down) * fold, BY_NAME["MQ4"])

    with open_hfq(build("MQ4", "MQ4", change=change)) as file:
        stage = check_fidelity(file, checkpoint, cfg, None)
        assert stage.ok, stage.complaints
        rows = {(row["layer"], row["projection"]): row for row in stage.as_json()["rows"]}
    assert rows[0, "w2"]["snr_db"] > 9 and rows[0, "w3"]["snr_db"] > 12


class Holed:
    """A source in which some tensors hold nothing but zeros."""

    def __init__(self, source: Checkpoint, *names: str) -> None:
        self.source, self.names = source, names

    def weight(self, name: str) -> np.ndarray:
        return self.source.weight(name) * np.float32(name not in self.names)


def zeroed(*names: str) -> Any:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        for name in names:
            by_name(tensors)[name][:] = 0

    return change


@pytest.mark.parametrize("hole", [expert_name(1, 2, "w2"), "model.layers.0.input_layernorm.weight"])
def test_zeros_that_equal_the_sources_zeros_are_no_proof(
    build: Build, checkpoint: Checkpoint, hole: str
) -> None:
    with open_hfq(build("MQ2-Lloyd", "MQ4", change=zeroed(hole))) as file:
        stage = check_fidelity(file, Holed(checkpoint, hole), checkpoint.config, None)
    assert not stage.ok
    assert [text for text in stage.complaints if "zeros" in text] == list(stage.complaints)
    assert stage.complaints[0].startswith(f"{hole}: holds only zeros")


def test_a_routing_bias_of_zeros_is_noted_and_not_scored(build: Build, checkpoint: Checkpoint) -> None:
    bias = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    with open_hfq(build("MQ2-Lloyd", "MQ4", change=zeroed(bias))) as file:
        stage = check_fidelity(file, Holed(checkpoint, bias), checkpoint.config, None)
        against_others = check_fidelity(file, checkpoint, checkpoint.config, None)
    assert stage.ok, stage.complaints
    assert stage.notes == ("1 routing biases hold only zeros, as in the source; they are not scored",)
    rows = [(row["layer"], row["projection"]) for row in stage.as_json()["rows"]]
    assert (1, "block_sparse_moe.e_score_correction_bias") in rows
    assert (0, "block_sparse_moe.e_score_correction_bias") not in rows
    assert not against_others.ok, "zeros in place of the source's values are a fault"


def test_every_matrix_has_its_row(build: Build, checkpoint: Checkpoint) -> None:
    with open_hfq(build("MQ3-Lloyd", "MQ6")) as file:
        stage = check_fidelity(
            file, checkpoint, checkpoint.config, read_imatrix(checkpoint.path / "imatrix.gguf")
        )
        nothing = check_fidelity(file, checkpoint, checkpoint.config, None, [])
    assert stage.ok and stage.seen == sum(1 for _ in inventory(checkpoint.config))
    rows = {(row["layer"], row["projection"]): row for row in stage.as_json()["rows"]}
    assert rows[1, "w1"]["tensors"] == checkpoint.config.num_local_experts
    assert rows[1, "w2"]["output_snr_db"] > rows[1, "w1"]["output_snr_db"] > 8
    assert rows[None, "lm_head"]["snr_db"] > 35
    assert not nothing.ok and nothing.complaints == ("the stage saw no tensors",)
