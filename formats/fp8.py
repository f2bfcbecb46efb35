"""FP8 E4M3 with F32 block scales, as MiniMax-M2 checkpoints store their matrices.

A weight is `e4m3(code) * scale_inv[r // 128, c // 128]`: despite its name the stored scale multiplies. Tiles at the
right and bottom edge are partial when a dimension is not a multiple of the block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import WeightError
from .jit import compiler

BLOCK = (128, 128)
MAX = 448.0


def _e4m3_table() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(code & 127) == 127] = np.nan
    table: NDArray[np.float32] = np.where(code & 128, -magnitude, magnitude).astype(np.float32)
    return table


E4M3: NDArray[np.float32] = _e4m3_table()
"""The f32 value of each E4M3 (fn) code; codes 0x7F and 0xFF are NaN and there is no infinity."""


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """The shape that `weight_scale_inv` must have for a matrix of this shape."""
    rows, cols = shape
    return -(-rows // block[0]), -(-cols // block[1])


compiled = compiler(Path(__file__))


@compiled
def _dequantize(codes, scales, block_rows, block_cols, table, out):  # type: ignore[no-untyped-def]
    for r in range(codes.shape[0]):
        for tile in range(scales.shape[1]):
            s = scales[r // block_rows, tile]
            for c in range(tile * block_cols, min((tile + 1) * block_cols, codes.shape[1])):
                out[r, c] = table[codes[r, c]] * s


def dequantize(
    codes: NDArray[np.uint8],
    scale_inv: NDArray[np.float32],
    block: tuple[int, int] = BLOCK,
    *,
    name: str | None = None,
) -> NDArray[np.float32]:
    """Decode u8 codes [R, C] with f32 scales [ceil(R / rows), ceil(C / columns)] of `block` to f32 [R, C].

    Raises WeightError, naming the tensor `name`, for scales of another shape or not finite, for NaN codes, and where
    a product overflows f32.
    """
    _check_scales(codes.shape, scale_inv, block, name)
    out = np.empty(codes.shape, np.float32)
    _dequantize(np.ascontiguousarray(codes), np.ascontiguousarray(scale_inv), block[0], block[1], E4M3, out)
    if not np.isfinite(out).all():
        nan_codes = int(((codes & 127) == 127).sum())
        what = f"holds {nan_codes} NaN codes" if nan_codes else "overflows f32 after scaling"
        raise WeightError(f"the FP8 matrix {what}", tensor=name, hint="the shard is broken; fetch it again")
    return out


def check_codes(
    codes: NDArray[np.uint8], scale_inv: NDArray[np.float32], block: tuple[int, int] = BLOCK
) -> None:
    """Raise what `dequantize` would raise, without decoding where the largest scale shows that nothing overflows."""
    _check_scales(codes.shape, scale_inv, block, None)
    largest = float(np.abs(scale_inv).max(initial=0)) * MAX
    if largest > float(np.finfo(np.float32).max) or ((codes & 127) == 127).any():
        dequantize(codes, scale_inv, block)


def _check_scales(
    shape: tuple[int, ...], scale_inv: NDArray[np.float32], block: tuple[int, int], name: str | None
) -> None:
    if scale_inv.shape != scale_shape(shape, block):
        raise WeightError(
            f"weight_scale_inv has shape {scale_inv.shape}, but weight {shape} needs {scale_shape(shape, block)}",
            tensor=name,
        )
    if not np.isfinite(scale_inv).all():
        raise WeightError("weight_scale_inv holds values that are not finite", tensor=name)


def quantize(
    weights: NDArray[np.float32], block: tuple[int, int] = BLOCK
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Encode finite f32 [R, C] to (codes u8 [R, C], scale_inv f32 [ceil(R/128), ceil(C/128)]), nearest even.

    Each block's largest magnitude becomes 448; a block of zeros takes scale 1.
    """
    rows, cols = scale_shape(weights.shape, block)
    padded = np.zeros((rows * block[0], cols * block[1]), np.float32)
    padded[: weights.shape[0], : weights.shape[1]] = weights
    tiles = padded.reshape(rows, block[0], cols, block[1])
    amax = np.abs(tiles).max(axis=(1, 3))
    smallest = np.finfo(np.float32).smallest_subnormal
    scale = np.where(amax > 0, np.maximum(amax / np.float32(MAX), smallest), 1).astype(np.float32)
    scaled = np.clip(tiles / scale[:, None, :, None], -MAX, MAX).reshape(padded.shape)
    return _round_e4m3(scaled)[: weights.shape[0], : weights.shape[1]].copy(), scale


def _round_e4m3(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round f32 in [-448, 448] to E4M3 codes, nearest even."""
    magnitude = np.abs(x).astype(np.float64)
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, -6), -6)
    steps = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int64)  # 8..16, below 8 only when subnormal
    code = steps + 8 * (exponent + 6)
    rounded: NDArray[np.uint8] = (code | np.where(np.signbit(x), 128, 0)).astype(np.uint8)
    return rounded
