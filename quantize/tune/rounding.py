"""Trained values as a file stores them: levels f16 and ascending, scales positive, matrices in Q8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import AffineFormat, LloydFormat
from ...lloyd.constants import F16_MAX

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

SMALLEST_SCALE = float(np.finfo(np.float16).smallest_normal)


def within_f16(values: F32) -> F32:
    """Values cut off at the largest finite f16."""
    return np.clip(values, -F16_MAX, F16_MAX)


def within_scales(values: F32) -> F32:
    """AWQ scales that stay positive and finite in f16."""
    return np.clip(values, SMALLEST_SCALE, F16_MAX)


def with_heads(fmt: LloydFormat | AffineFormat, payload: U8, heads: F32) -> U8:
    """A payload u8 [bytes] with the same codes and other heads f32 [G, n]: levels, or scale and zero.

    A level moves past its neighbour hardly ever; such neighbours meet halfway, since codebooks are ascending.
    """
    groups = fmt.groups(payload).copy()
    if isinstance(fmt, AffineFormat):
        stored = np.ascontiguousarray(heads, "<f4").view(np.uint8)
    else:
        levels = within_f16(heads).astype("<f2")
        odd = np.flatnonzero((levels[:, 1:] < levels[:, :-1]).any(axis=1))
        if odd.size:
            codes = fmt.unpack(groups[odd])[1]
            used = np.stack([(codes == k).any(axis=1) for k in range(fmt.levels)], axis=1)
            levels[odd] = ascending(levels[odd].astype(np.float32), used)
        stored = levels.view(np.uint8)
    groups[:, : stored.shape[1]] = stored
    return groups.reshape(-1)


def ascending(levels: F32, used: NDArray[np.bool_]) -> F32:
    """Levels f32 [G, n] made ascending, G groups at once: those that no code uses give way, others meet halfway.

    At least one level of each group is used.
    """
    below = np.maximum.accumulate(np.where(used, levels, -np.inf), axis=1)
    above = _from_right(np.where(used, levels, np.inf))
    met = np.where(used, (below + above) / 2, levels)
    low = np.maximum.accumulate(np.where(used, met, -np.inf), axis=1)
    high = _from_right(np.where(used, met, np.inf))
    # Unused levels that follow each other may still cross, so the last step takes the running maximum.
    return np.maximum.accumulate(np.clip(met, low, high), axis=1).astype(np.float32)


def _from_right(values: F32) -> F32:
    """The smallest of each value and those to its right."""
    return np.minimum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
