"""Single tensors of a checkpoint: the values that are refused, and those that are right for every stored type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_model
import torch
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import CheckpointError, WeightError
from mq_quant.formats.fp8 import E4M3
from small_model import CONFIG, W1, W1_SCALE, Tensors

WHOLE = small_model.tensors()
NORM = "model.norm.weight"


def altered(**changes: torch.Tensor | None) -> Tensors:
    """The whole checkpoint with some tensors replaced, added, or (None) left out."""
    return {n: t for n, t in (WHOLE | changes).items() if t is not None}


def poisoned(name: str, value: float | int) -> Tensors:
    tensor = WHOLE[name].clone()
    flat = tensor.view(-1)
    if tensor.dtype == torch.float8_e4m3fn:
        flat.view(torch.uint8)[7] = int(value)
    else:
        flat[1] = value
    return altered(**{name: tensor})


@pytest.mark.parametrize(
    ("stored", "asked", "value", "text"),
    [
        (W1, W1, 0x7F, "1 NaN codes"),
        (W1, W1, 0xFF, "1 NaN codes"),
        (W1_SCALE, W1, float("nan"), "not finite"),
        (W1_SCALE, W1, float("inf"), "not finite"),
        (W1_SCALE, W1, 3e38, "overflows"),
        (NORM, NORM, float("-inf"), "1 of 256 values are not finite"),
        ("model.layers.0.block_sparse_moe.gate.weight",) * 2 + (float("nan"), "1 of 768 values"),
    ],
)
def test_poisoned_values(stored: str, asked: str, value: float, text: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, poisoned(stored, value)))
    checkpoint.validate()
    with pytest.raises(WeightError, match=text) as e:
        checkpoint.weight(asked)
    assert e.value.tensor == asked
    assert ".safetensors" in (e.value.file or "")


def test_weight_of_no_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(count=torch.ones(2, dtype=torch.int32))))
    with pytest.raises(CheckpointError, match="no such tensor"):
        checkpoint.weight("nowhere")
    with pytest.raises(WeightError, match="is I32"):
        checkpoint.weight("count")


def test_unvalidated_fp8_without_scale_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(**{W1_SCALE: None})))
    with pytest.raises(WeightError, match="without a block scale"):
        checkpoint.weight(W1)


def reference(content: Tensors, name: str) -> np.ndarray:
    weight = content[name].float()
    scale = content.get(name + "_scale_inv")
    if scale is not None:
        rows, cols = weight.shape
        weight = weight * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return weight.numpy()


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_weights(shards: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE, shards))
    checkpoint.validate()
    assert len(checkpoint.shards) == shards
    for name in (n for n in WHOLE if not n.endswith("_scale_inv")):
        weight = checkpoint.weight(name)
        assert weight.dtype == np.float32
        assert np.array_equal(weight, reference(WHOLE, name)), name


def hollow(name: str, low: int = 0, high: int | None = None) -> Tensors:
    """The whole checkpoint with zeros in rows low to high of one tensor."""
    tensor = WHOLE[name].clone()
    (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)[low:high] = 0
    return altered(**{name: tensor})


ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
BIAS = "model.layers.0.block_sparse_moe.e_score_correction_bias"
EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize("name", [W1, W1_SCALE, NORM, ROUTER, EMBED])
def test_a_weight_of_zeros_only_is_refused_by_name(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, hollow(name)))
    checkpoint.validate()
    asked = W1 if name == W1_SCALE else name
    with pytest.raises(WeightError, match="zero") as e:
        checkpoint.weight(asked)
    assert e.value.tensor == asked


def test_negative_zeros_are_zeros_too(tmp_path: Path) -> None:
    codes = torch.full((256, 256), 0x80, dtype=torch.uint8).view(torch.float8_e4m3fn)
    content = altered(**{W1: codes, NORM: torch.full((256,), -0.0, dtype=torch.bfloat16)})
    checkpoint = open_checkpoint(small_model.save(tmp_path, content))
    for name in (W1, NORM):
        with pytest.raises(WeightError, match="zero"):
            checkpoint.weight(name)


def test_a_zero_scale_over_codes_that_are_not_zero_is_refused(tmp_path: Path) -> None:
    scale = WHOLE[W1_SCALE].clone()
    scale[1, 0] = 0
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(**{W1_SCALE: scale})))
    for read in (checkpoint.weight, checkpoint.stored):
        with pytest.raises(WeightError, match=r"zero at \[1, 0\]"):
            read(W1)


def test_a_negative_scale_is_refused(tmp_path: Path) -> None:
    """One flipped bit makes one of a scale, and of nothing else that a checkpoint holds is it so easily told."""
    scale = WHOLE[W1_SCALE].clone()
    scale[1, 1] *= -1
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(**{W1_SCALE: scale})))
    for read in (checkpoint.weight, checkpoint.stored):
        with pytest.raises(WeightError, match=r"negative at \[1, 1\]"):
            read(W1)


def test_zeros_that_good_checkpoints_hold_are_read(tmp_path: Path) -> None:
    scale, codes = WHOLE[W1_SCALE].clone(), WHOLE[W1].clone()
    scale[0, 1] = 0
    codes.view(torch.uint8)[:128, 128:] = 0
    content = hollow(BIAS) | {W1: codes, W1_SCALE: scale, EMBED: hollow(EMBED, 100)[EMBED]}
    checkpoint = open_checkpoint(small_model.save(tmp_path, content))
    assert not checkpoint.weight(BIAS).any()
    assert not checkpoint.weight(W1)[:128, 128:].any()
    assert not checkpoint.rows(EMBED, 200, 300).any()
    assert not checkpoint.rows(EMBED, 5, 5).size


def test_rows_of_a_tensor_of_zeros_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, hollow(EMBED)))
    with pytest.raises(WeightError, match="zero"):
        checkpoint.rows(EMBED, 0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_matrix_that_was_never_quantised_is_a_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = {n: t.to(dtype) for n, t in WHOLE.items() if not n.endswith("_scale_inv")}
    config = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    checkpoint = open_checkpoint(small_model.save(tmp_path, plain, config=config))
    checkpoint.validate()
    for name, tensor in plain.items():
        assert np.array_equal(checkpoint.weight(name), tensor.float().numpy()), name
    with pytest.raises(WeightError, match="not FP8"):
        checkpoint.stored(W1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_scales_of_any_float_type_and_name_multiply(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    scale = WHOLE[W1_SCALE].to(dtype)
    content = altered(**{W1_SCALE: None, W1 + suffix: scale})
    checkpoint = open_checkpoint(small_model.save(tmp_path, content))
    checkpoint.validate()
    assert np.array_equal(checkpoint.weight(W1), reference(WHOLE | {W1_SCALE: scale.float()}, W1))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_scales_that_are_exponents(as_bytes: bool, tmp_path: Path) -> None:
    exponents = torch.tensor([[0, 1], [127, 130]], dtype=torch.uint8)
    stored = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(**{W1_SCALE: stored})))
    checkpoint.validate()
    _, scales = checkpoint.stored(W1)
    assert scales.tolist() == [[2.0**-127, 2.0**-126], [1.0, 8.0]]
    exact = WHOLE[W1].double() * torch.from_numpy(scales.astype(np.float64)).repeat_interleave(
        128, 0
    ).repeat_interleave(128, 1)
    assert np.array_equal(checkpoint.weight(W1), exact.numpy().astype(np.float32))


def test_an_exponent_that_is_no_number_is_refused(tmp_path: Path) -> None:
    scale = torch.full((2, 2), 255, dtype=torch.uint8)
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(**{W1_SCALE: scale})))
    with pytest.raises(WeightError, match="not finite"):
        checkpoint.weight(W1)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_whole_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    content = {n: torch.full(shape, 0.5) if n.endswith("_scale_inv") else t for n, t in WHOLE.items()}
    config = CONFIG | {"quantization_config": {"weight_block_size": None}}
    checkpoint = open_checkpoint(small_model.save(tmp_path, content, config=config))
    checkpoint.validate()
    assert np.array_equal(checkpoint.weight(W1), WHOLE[W1].float().numpy() * np.float32(0.5))


def test_stored_codes_times_scales_have_the_bits_of_the_weight(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE))
    for name in (n for n in WHOLE if n + "_scale_inv" in WHOLE):
        codes, scales = checkpoint.stored(name)
        assert (codes.dtype, scales.dtype) == (np.uint8, np.float32)
        wide = scales.repeat(128, 0)[: codes.shape[0]].repeat(128, 1)[:, : codes.shape[1]]
        assert np.array_equal(E4M3[codes] * wide, checkpoint.weight(name)), name


@pytest.mark.parametrize(("stored", "value"), [(W1, 0x7F), (W1_SCALE, float("nan")), (W1_SCALE, 3e38)])
def test_stored_refuses_what_weight_refuses(stored: str, value: float, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, poisoned(stored, value)))
    with pytest.raises(WeightError) as of_weight:
        checkpoint.weight(W1)
    with pytest.raises(WeightError) as of_stored:
        checkpoint.stored(W1)
    assert str(of_stored.value) == str(of_weight.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named_with_what_to_do(value: float, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, poisoned(W1_SCALE, value)))
    for read in (checkpoint.weight, checkpoint.stored):
        with pytest.raises(
            WeightError, match=rf"{W1_SCALE} holds values that are not finite\n.*fetch it again"
        ):
            read(W1)
