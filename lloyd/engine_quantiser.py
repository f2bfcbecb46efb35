"""The engine's own quantiser, bit for bit: the baseline that every better fit is measured against.

Lloyd formats take at most eight plain Lloyd iterations from quantiles, after which no code is assigned anew; affine
formats span the range from minimum to maximum; Q8F16 quantises with the scale in f32 and stores it truncated to f16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .constants import ENGINE_STEPS, GROUP
from .loops import compiled


@compiled
def sort_group(values, keys, spare, counts):
    """Sort f32 values [256] ascending, in place: a radix sort of their order-preserving bits, four passes of eight.

    `keys` and `spare` u32 [256] and `counts` i32 [4, 256] are scratch.
    """
    bits = values.view(np.uint32)
    counts[:] = 0
    for i in range(GROUP):
        b = bits[i]
        key = ~b if b >> np.uint32(31) else b | np.uint32(0x80000000)
        keys[i] = key
        counts[0, key & np.uint32(255)] += 1
        counts[1, (key >> np.uint32(8)) & np.uint32(255)] += 1
        counts[2, (key >> np.uint32(16)) & np.uint32(255)] += 1
        counts[3, key >> np.uint32(24)] += 1
    source, target = keys, spare
    for step in range(4):
        shift = np.uint32(8 * step)
        start = np.int32(0)
        for d in range(256):
            n = counts[step, d]
            counts[step, d] = start
            start += n
        for i in range(GROUP):
            key = source[i]
            digit = (key >> shift) & np.uint32(255)
            target[counts[step, digit]] = key
            counts[step, digit] += 1
        source, target = target, source
    for i in range(GROUP):
        key = keys[i]
        bits[i] = key & np.uint32(0x7FFFFFFF) if key >> np.uint32(31) else ~key


@compiled
def lloyd_rows(rows, column, levels, codes):
    """Centroids f32 [R, K], ascending, not yet rounded, and codes u8 [R, 256] of each row's group at `column`."""
    count = levels.shape[1]
    values = np.empty(GROUP, np.float32)
    keys = np.empty(GROUP, np.uint32)
    spare = np.empty(GROUP, np.uint32)
    counts = np.empty((4, 256), np.int32)
    centroids = np.empty(count, np.float32)
    total = np.empty(count, np.float64)
    members = np.empty(count, np.int64)
    order = np.empty(count, np.int64)
    for r in range(rows.shape[0]):
        values[:] = rows[r, column : column + GROUP]
        sort_group(values, keys, spare, counts)
        out = codes[r]
        if values[0] == values[GROUP - 1]:
            # Zeros of either sign count as equal and keep their order, so each quantile is read from the group itself.
            for k in range(count):
                levels[r, k] = rows[
                    r, column + int(np.floor((GROUP - 1.0) * (2 * k + 1) / (2 * count) + 0.5))
                ]
            out[:] = 0
            continue
        for k in range(count):
            centroids[k] = values[int(np.floor((GROUP - 1.0) * (2 * k + 1) / (2 * count) + 0.5))]
        for step in range(ENGINE_STEPS):
            changed = False
            total[:] = 0.0
            members[:] = 0
            for i in range(GROUP):
                v = rows[r, column + i]
                best = 0
                nearest = abs(v - centroids[0])
                for k in range(1, count):
                    d = abs(v - centroids[k])
                    if d < nearest:
                        nearest = d
                        best = k
                changed = changed or out[i] != best
                out[i] = best
                total[best] += np.float64(v)
                members[best] += 1
            if step > 0 and not changed:
                break
            for k in range(count):
                if members[k] > 0:
                    centroids[k] = np.float32(total[k] / members[k])
        for k in range(count):
            before = 0
            for other in range(count):
                if centroids[other] < centroids[k] or (centroids[other] == centroids[k] and other < k):
                    before += 1
            order[k] = before
            levels[r, before] = centroids[k]
        for i in range(GROUP):
            out[i] = order[out[i]]


def affine(
    groups: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """(scale f32 [G], zero f32 [G], codes u8 [G, 256]) of f32 groups [G, 256] over their full range."""
    zero = groups.min(axis=1) + np.float32(0)
    width = groups.max(axis=1) - zero
    scale = _divisor(width / np.float32(count - 1))
    inverse = (np.float32(1) / scale)[:, None]
    q = np.floor((groups - zero[:, None]) * inverse + np.float32(0.5))
    return scale, zero, np.clip(q, 0, count - 1).astype(np.uint8)


def _divisor(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales f32 with 1 in place of 0 and of subnormals, whose reciprocals may overflow."""
    return np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))


def q8(groups: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """(scale f16 [G], codes i8 [G, 32]) of f32 groups [G, 32]."""
    scale = (np.abs(groups).max(axis=1) / np.float32(127)).astype(np.float32)
    x = groups * (np.float32(1) / _divisor(scale))[:, None]
    q = np.trunc(x + np.copysign(np.float32(0.5), x))
    return truncate_f16(scale), np.clip(q, -127, 127).astype(np.int8)


def truncate_f16(x: NDArray[np.float32]) -> NDArray[np.float16]:
    """f32 [...] ≥ 0 to f16, towards zero."""
    with np.errstate(over="ignore"):
        near = x.astype(np.float16)
    above = near.astype(np.float32) > x
    down: NDArray[np.float16] = np.where(above, (near.view(np.uint16) - 1).view(np.float16), near)
    return down
