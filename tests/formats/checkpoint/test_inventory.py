"""Checkpoints whose tensors do not fit their config: each fault by name, before a weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_model
import torch
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import CheckpointError
from small_model import CONFIG, W1, W1_SCALE, Tensors

WHOLE = small_model.tensors()
NORM = "model.norm.weight"


def altered(**changes: torch.Tensor | None) -> Tensors:
    """The whole checkpoint with some tensors replaced, added, or (None) left out."""
    return {n: t for n, t in (WHOLE | changes).items() if t is not None}


INVENTORY: dict[str, tuple[Tensors, str, str]] = {
    "weight missing": (altered(**{NORM: None}), NORM, "is missing"),
    "unknown tensor": (altered(extra=torch.zeros(3)), "extra", "not a tensor of this model"),
    "FP8 without scale": (altered(**{W1_SCALE: None}), W1, "its scale .* is missing"),
    "scale without weight": (
        altered(**{"model.layers.0.mlp.weight_scale_inv": torch.ones(1, 1)}),
        "model.layers.0.mlp.weight_scale_inv",
        "scale without its weight",
    ),
    "scale of a plain weight": (
        altered(**{NORM + "_scale_inv": torch.ones(1, 1)}),
        NORM + "_scale_inv",
        "scales a weight that is not FP8",
    ),
    "scale of another shape": (
        altered(**{W1_SCALE: torch.ones(2, 1)}),
        W1_SCALE,
        r"\[2, 1\], but for blocks of 128 x 128 .* needs \[2, 2\]",
    ),
    "scale of another dtype": (altered(**{W1_SCALE: torch.ones(2, 2).double()}), W1_SCALE, "is F64"),
    "two scales": (altered(**{W1 + "_scale": torch.ones(2, 2)}), W1 + "_scale", "second scale"),
    "weight of another shape": (altered(**{NORM: torch.zeros(255)}), NORM, r"has shape \[255\]"),
    "weight of another dtype": (altered(**{NORM: torch.zeros(256).double()}), NORM, "is F64"),
    "layer of a number beyond all": (
        altered(**{f"model.layers.{'9' * 5000}.x": torch.ones(1)}),
        f"model.layers.{'9' * 5000}.x",
        "not a tensor of this model",
    ),
    "experts fused": (
        altered(**{"model.layers.0.mlp.experts.gate_up_proj": torch.ones(3, 512, 256)}),
        "model.layers.0.mlp.experts.gate_up_proj",
        "all experts of a layer in one tensor",
    ),
    "FP8 where none belongs": (
        altered(**{NORM: torch.zeros(256).to(torch.float8_e4m3fn)}),
        NORM,
        "is F8_E4M3",
    ),
    "whole numbers where FP8 belongs": (
        altered(**{W1: torch.zeros(256, 256, dtype=torch.int8), W1_SCALE: None}),
        W1,
        "is I8, not F8_E4M3, BF16, F16 or F32",
    ),
    "plain weight with a scale": (
        altered(**{W1: torch.ones(256, 256)}),
        W1_SCALE,
        "scales a weight that is not FP8",
    ),
}


@pytest.mark.parametrize("case", INVENTORY)
def test_inventory(case: str, tmp_path: Path) -> None:
    content, name, text = INVENTORY[case]
    checkpoint = open_checkpoint(small_model.save(tmp_path, content))
    with pytest.raises(CheckpointError, match=text) as e:
        checkpoint.validate()
    assert e.value.tensor == name


def test_many_problems_are_listed_and_bounded(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 2**8}
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE, config=config))
    with pytest.raises(CheckpointError, match=r"layers\.2\.input_layernorm\.weight: is missing") as e:
        checkpoint.validate()
    assert "and more" in str(e.value)


def test_experts_and_layers_against_the_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE, config=CONFIG | {"num_local_experts": 2}))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.weight: is not a tensor"):
        checkpoint.validate()


MTP = {
    "mtp.head.weight": torch.zeros(2),
    "model.mtp.layers.0.enorm.weight": torch.ones(2),
    "model.mtp_block.0.w.weight": torch.ones(2),
    "model.layers.2.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1),
}
UNUSED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32),
    "model.rotary_emb.inv_freq": torch.ones(32),
    W1.removesuffix("weight") + "input_scale": torch.ones(1),
    "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
}


def test_mtp_tensors_are_skipped_and_counted(tmp_path: Path) -> None:
    config = CONFIG | {"num_mtp_modules": 1}
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE | MTP, config=config))
    checkpoint.validate()
    assert set(checkpoint.skipped_mtp) == set(MTP)
    (said,) = checkpoint.notes
    assert "4 tensors" in said
    assert "multi-token-prediction" in said
    assert "mtp.head.weight" in said or "model.layers.2" in said


@pytest.mark.parametrize("key", ["num_mtp_modules", "num_nextn_predict_layers"])
def test_a_config_of_fewer_layers_is_told_from_mtp_modules(key: str, tmp_path: Path) -> None:
    """Also where the released config's count of modules, of which no tensor was published, would cover the layers."""
    config = CONFIG | {"num_hidden_layers": 1, key: 3}
    with pytest.raises(CheckpointError, match=r"layers\.1\..*num_hidden_layers in config.json is 1") as e:
        open_checkpoint(small_model.save(tmp_path, WHOLE, config=config)).validate()
    assert "whole decoder layer" in str(e.value) and "correct num_hidden_layers" in str(e.value)


def test_a_further_layer_that_nobody_counts_names_the_key(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match="num_mtp_modules") as e:
        open_checkpoint(small_model.save(tmp_path, WHOLE | {name: torch.ones(2)})).validate()
    assert name in str(e.value) and "and more" not in str(e.value)


def test_a_checkpoint_without_lm_head_names_the_key_of_tied_embeddings(tmp_path: Path) -> None:
    tensors = {name: t for name, t in WHOLE.items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is missing") as e:
        open_checkpoint(small_model.save(tmp_path, tensors)).validate()
    assert "tie_word_embeddings" in str(e.value)


def test_tables_and_scales_of_activations_are_left_out_with_a_note(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE | UNUSED))
    checkpoint.validate()
    assert checkpoint.skipped_mtp == ()
    (said,) = checkpoint.notes
    assert "4 tensors" in said


def test_a_complete_checkpoint_needs_no_note(tmp_path: Path) -> None:
    assert open_checkpoint(small_model.save(tmp_path, WHOLE)).notes == ()


def test_blocks_of_another_size_name_the_key_that_says_so(tmp_path: Path) -> None:
    half = {n: t.repeat(2, 2) if n.endswith("_scale_inv") else t for n, t in WHOLE.items()}
    with pytest.raises(CheckpointError, match="weight_block_size") as e:
        open_checkpoint(small_model.save(tmp_path / "a", half)).validate()
    assert "incomplete" not in str(e.value)
    config = CONFIG | {"quantization_config": {"weight_block_size": [64, 64]}}
    open_checkpoint(small_model.save(tmp_path / "b", half, config=config)).validate()


def test_a_checkpoint_without_fp8_is_complete(tmp_path: Path) -> None:
    plain = {n: t.bfloat16() for n, t in WHOLE.items() if not n.endswith("_scale_inv")}
    config = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    open_checkpoint(small_model.save(tmp_path, plain, config=config)).validate()
