"""Weights that are too large for what a format stores are refused by name, and never cut off."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import AffineFormat, Format, LloydFormat
from ...formats.errors import WeightError
from ...lloyd.constants import F16_MAX
from ...lloyd.encode import Fit, encode_plain

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

F16_OVERFLOW = 65520.0
"""The smallest number that rounds to an infinite f16."""
_STEPS = {"F16": 1, "Q8F16": 127}
"""The largest multiple of an f16 that a plain format stores: the value itself, or 127 times the group's scale."""
_HINT = (
    "such values come from a broken export; compare the tensor and its scales with the original checkpoint"
)


def encode_tensor(name: str, values: F32, fmt: Format, fit: Fit) -> U8:
    """The payload u8 [bytes] of a tensor outside the experts, f32 of any shape, in an unrotated format.

    Raises WeightError that names the tensor where a value is beyond what the format stores.
    """
    steps = _STEPS.get(fmt.name)
    if steps is not None:
        largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        if not largest / steps < F16_OVERFLOW:
            raise WeightError(
                f"holds values of up to {largest:.6g}, but {fmt.name} can store {steps * F16_MAX:.0f} at most",
                tensor=name,
                hint=_HINT,
            )
    return encode_plain(values, fmt, fit)


def check_levels(name: str, fmt: Format, payload: U8) -> None:
    """WeightError that names the tensor where a level of a rotated format's payload is at its type's limit.

    The fits cut levels off there, so such a level stands for weights that were larger.
    """
    if isinstance(fmt, LloydFormat):
        levels = _head(fmt, payload, "<f2", fmt.levels)
        bad = ~(np.abs(levels) < F16_MAX)
        limit = F16_MAX
    elif isinstance(fmt, AffineFormat):
        head = _head(fmt, payload, "<f4", 2)
        with np.errstate(over="ignore", invalid="ignore"):
            bad = ~np.isfinite(head[:, 1] + head[:, 0] * np.float32(fmt.levels - 1))
        limit = float(np.finfo(np.float32).max)
    else:
        raise TypeError(f"{fmt.name} is not a rotated format")
    if bad.any():
        groups = int(bad.reshape(len(bad), -1).any(axis=1).sum())
        raise WeightError(
            f"needs levels beyond {limit:.6g}, the most that {fmt.name} stores, in {groups} of {len(bad)} groups",
            tensor=name,
            hint=_HINT,
        )


def _head(fmt: LloydFormat | AffineFormat, payload: U8, dtype: str, count: int) -> NDArray[np.floating]:
    """The first `count` numbers of every group, [groups, count]."""
    width = np.dtype(dtype).itemsize * count
    return np.ascontiguousarray(fmt.groups(payload)[:, :width]).view(dtype)
