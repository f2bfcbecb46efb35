"""FP8 E4M3 with block scales: every code against torch, tiles that are cut off, and scales that must be refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import WeightError
from mq_quant.formats.fp8 import E4M3, dequantize, quantize, scale_shape


def torch_values(codes: np.ndarray) -> np.ndarray:
    return torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()


def torch_codes(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def finite_codes(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    codes = random.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0
    return codes


def test_nan_codes_are_refused_by_name_and_number() -> None:
    codes = np.zeros((4, 4), np.uint8)
    codes[1, 2], codes[3, 3] = 0x7F, 0xFF
    with pytest.raises(WeightError, match="2 NaN codes") as e:
        dequantize(codes, np.ones((1, 1), np.float32), name="layers.0.w1")
    assert e.value.tensor == "layers.0.w1"
    assert e.value.hint


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(WeightError, match="that are not finite"):
        dequantize(np.zeros((2, 2), np.uint8), np.full((1, 1), bad, np.float32))


def test_a_product_beyond_f32_is_refused() -> None:
    codes = np.full((1, 1), 0x7E, np.uint8)
    with pytest.raises(WeightError, match="overflows"):
        dequantize(codes, np.full((1, 1), 1e37, np.float32))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1,), (2, 2, 1), (0, 0)])
def test_scales_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightError, match="has shape"):
        dequantize(np.zeros((129, 129), np.uint8), np.ones(shape, np.float32))


def test_transposed_scales_are_refused() -> None:
    with pytest.raises(WeightError, match=r"\(2, 1\)"):
        dequantize(np.zeros((200, 100), np.uint8), np.ones((1, 2), np.float32))


def test_every_code_has_torchs_value() -> None:
    np.testing.assert_array_equal(E4M3, torch_values(np.arange(256).astype(np.uint8)))
    assert np.signbit(E4M3[0x80]) and not np.signbit(E4M3[0])


def test_rounding_is_torchs_at_every_midpoint() -> None:
    """All halfway values between neighbours, one f32 step to either side of them, and everything below the smallest."""
    known = E4M3[:127]
    middle = (known[1:] + known[:-1]) / 2
    values = np.concatenate(
        [known, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(500))]
    ).astype(np.float32)
    values = np.concatenate([values, -values, np.float32([1e-10, -1e-10, 2.0**-149])])
    values[0] = 448  # keeps the block's scale at 1
    codes, scale = quantize(values[None], block=(1, len(values)))
    np.testing.assert_array_equal(scale, [[1.0]])
    np.testing.assert_array_equal(codes, torch_codes(values[None]))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_partial_tiles_take_the_scale_of_their_tile(
    rows: int, cols: int, block_rows: int, block_cols: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = finite_codes(random, (rows, cols))
    scale = random.uniform(-4, 4, scale_shape((rows, cols), (block_rows, block_cols))).astype(np.float32)
    got = dequantize(codes, scale, (block_rows, block_cols))
    values = torch_values(codes)
    for r in range(rows):
        for c in range(cols):
            assert got[r, c] == values[r, c] * scale[r // block_rows, c // block_cols]


def test_full_size_tiles_with_partial_edges() -> None:
    random = np.random.default_rng(5)
    codes = finite_codes(random, (300, 257))
    scale = random.uniform(0.1, 4, (3, 3)).astype(np.float32)
    wide = scale.repeat(128, 0).repeat(128, 1)[:300, :257]
    np.testing.assert_array_equal(dequantize(codes, scale), torch_values(codes) * wide)
    np.testing.assert_array_equal(dequantize(np.asfortranarray(codes), scale), torch_values(codes) * wide)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_quantised_values_are_fixed_points(rows: int, cols: int, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_t(3, (rows, cols)).astype(np.float32)
    codes, scale = quantize(weights, (16, 16))
    once = dequantize(codes, scale, (16, 16))
    again, scale_again = quantize(once, (16, 16))
    np.testing.assert_allclose(dequantize(again, scale_again, (16, 16)), once, rtol=1e-6)
    wide = scale.repeat(16, 0).repeat(16, 1)[:rows, :cols]
    step = np.maximum(np.abs(weights) / 16, wide * 2.0**-10)
    assert (np.abs(once - weights) <= step * 1.001).all()


def test_zeros_keep_their_sign_and_take_scale_one() -> None:
    codes, scale = quantize(np.float32([[0.0, -0.0]]))
    assert codes.tolist() == [[0, 128]]
    assert scale.tolist() == [[1.0]]


@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e38])
def test_blocks_at_the_ends_of_f32(size: float) -> None:
    weights = np.float32([[size, -size, 0, size]])
    codes, scale = quantize(weights)
    assert (scale > 0).all() and np.isfinite(scale).all()
    np.testing.assert_allclose(dequantize(codes, scale), weights, rtol=0.07)
