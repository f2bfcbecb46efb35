"""From the stored bytes of a tensor to f32: FP8 with its block scales, or plain floats, every value looked at.

A weight that is not finite, or that holds nothing but zeros, is refused with its name: the first comes from a broken
shard, the second from a hole in it, and both would give a file that looks well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, WeightError
from ..fp8 import check_codes, dequantize, scale_shape
from ..minimax import ModelConfig, may_be_zero
from .safetensors_file import TensorInfo
from .source import F32, U8

FP8 = "F8_E4M3"
FLOATS = ("BF16", "F16", "F32")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""The types of scales that are read; both of one byte are exponents, 2^(byte - 127)."""
SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""What tools append to a weight's name for its scales; under either name they multiply."""

_REFETCH = "the shard is broken; fetch it again"
_HOLE = "such a hole is left where a download was stopped or a disk lost data; fetch the shard again"
_PIECE = 16 << 20


def scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The block scales of a weight, or None where the checkpoint has none."""
    return next((tensors[name + s] for s in SCALE_SUFFIXES if name + s in tensors), None)


@dataclass(frozen=True)
class TensorReader:
    """Single tensors of one checkpoint; `read` gives a tensor's stored bytes, and `where` is named in errors."""

    tensors: Mapping[str, TensorInfo]
    config: ModelConfig
    read: Callable[[TensorInfo], U8]
    where: str | Path

    def weight(self, name: str) -> F32:
        """As `Source.weight`."""
        info = self._info(name)
        try:
            if info.dtype == FP8:
                codes, scales = self._fp8(info)
                return dequantize(codes, scales, self.config.block_shape)
            values = _finite(_plain(self.read(info), info))
            if not (values.any() or may_be_zero(name)):
                raise WeightError("all of its values are zero", hint=_HOLE)
            return values
        except WeightError as e:
            raise self._named(e, info) from None

    def rows(self, name: str, low: int, high: int) -> F32:
        """As `Source.rows`."""
        info = self._info(name)
        if not (info.shape and 0 <= low <= high <= info.shape[0]):
            raise ValueError(f"rows {low}:{high} are not inside shape {info.shape} of {name}")
        part = _part(info, low, high)
        try:
            values = _finite(_plain(self.read(part), part))
            if values.size and not values.any() and self._is_zero(info):
                raise WeightError("all of its values are zero", hint=_HOLE)
            return values
        except WeightError as e:
            raise self._named(e, info) from None

    def stored(self, name: str) -> tuple[U8, F32]:
        """As `Source.stored`."""
        info = self._info(name)
        try:
            codes, scales = self._fp8(info)
            check_codes(codes, scales, self.config.block_shape)
        except WeightError as e:
            raise self._named(e, info) from None
        return codes, scales

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError("no such tensor in the checkpoint", file=self.where, tensor=name)
        return self.tensors[name]

    def _named(self, error: WeightError, info: TensorInfo) -> WeightError:
        return WeightError(
            error.problem, file=f"{self.where}/{info.shard}", tensor=info.name, hint=error.hint
        )

    def _fp8(self, info: TensorInfo) -> tuple[U8, F32]:
        """Codes u8 [R, C] and scales f32 [blocks of rows, blocks of columns] of an FP8 matrix."""
        if info.dtype != FP8:
            raise WeightError(f"is {info.dtype}, not FP8")
        scale = scale_of(info.name, self.tensors)
        if scale is None or len(info.shape) != 2:
            raise WeightError("is FP8 without a block scale")
        codes = self.read(info).reshape(info.shape)
        scales = _plain(self.read(scale), scale, of_scales=True)
        needed = scale_shape(info.shape, self.config.block_shape)
        if scales.size == 1 and needed == (1, 1):
            scales = scales.reshape(1, 1)
        if not np.isfinite(scales).all():
            raise WeightError(f"its scale {scale.name} holds values that are not finite", hint=_REFETCH)
        if not scales.any():
            raise WeightError(f"all of its scales ({scale.name}) are zero", hint=_HOLE)
        if not (codes & 127).any():
            raise WeightError("all of its FP8 codes are zero", hint=_HOLE)
        if scales.shape == needed and not (scales > 0).all():
            _refuse_lost_scales(codes, scales, self.config.block_shape, scale.name)
        return codes, scales

    def _is_zero(self, info: TensorInfo) -> bool:
        """Whether a plain tensor holds nothing but zeros, read in pieces; the sign of a zero does not matter."""
        if may_be_zero(info.name):
            return False
        each = max(1, (info.stop - info.start) // info.shape[0])
        step = max(1, _PIECE // each)
        parts = (_part(info, low, min(low + step, info.shape[0])) for low in range(0, info.shape[0], step))
        return not any(_plain(self.read(part), part).any() for part in parts)


def _part(info: TensorInfo, low: int, high: int) -> TensorInfo:
    """Rows low to high of a tensor as a tensor of its own."""
    each = (info.stop - info.start) // info.shape[0]
    shape = (high - low, *info.shape[1:])
    return replace(info, shape=shape, start=info.start + low * each, stop=info.start + high * each)


def _refuse_lost_scales(codes: U8, scales: F32, block: tuple[int, int], name: str) -> None:
    """A block whose scale is zero must hold zero codes, and no scale is negative: no encoder writes others."""
    for row, col in np.argwhere(scales < 0):
        raise WeightError(f"its scale {name} is negative at [{row}, {col}]", hint=_REFETCH)
    for row, col in np.argwhere(scales == 0):
        tile = codes[row * block[0] : (row + 1) * block[0], col * block[1] : (col + 1) * block[1]]
        if (tile & 127).any():
            raise WeightError(
                f"its scale {name} is zero at [{row}, {col}], where its codes are not", hint=_HOLE
            )


def _finite(values: F32) -> F32:
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise WeightError(f"{bad} of {values.size} values are not finite", hint=_REFETCH)
    return values


def _plain(stored: U8, info: TensorInfo, *, of_scales: bool = False) -> F32:
    """Stored bytes of a float type as f32 of the tensor's shape; exact for every type that is read."""
    if info.dtype not in (SCALES if of_scales else FLOATS):
        raise WeightError(f"is {info.dtype}, which is no {'scale' if of_scales else 'weight'}")
    values: NDArray[np.float32]
    if info.dtype == "BF16":
        values = (stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif info.dtype in ("F8_E8M0", "U8"):
        values = E8M0[stored]
    else:
        values = stored.view("<f4" if info.dtype == "F32" else "<f2").astype(np.float32)
    return values.reshape(info.shape)


def _e8m0_table() -> F32:
    with np.errstate(over="ignore"):
        table = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    table[255] = np.nan
    return table


E8M0: F32 = _e8m0_table()
"""The f32 value of each E8M0 byte; 255 is NaN, and 0 is 2^-127, which f32 holds as a subnormal number."""
