"""Primitives on lanes: a block f32 [256, 16] holds one group of 16 rows, row index last; codes are f32 whole numbers.

All functions are compiled and work in place.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..constants import GROUP
from ..loops import compiled, inlined
from .vec import LANES, fma, load, splat, store, where_gt

PANEL = 8
"""Rows of a matrix that `product` takes at a time: their sums stay in registers."""


@compiled
def block_of(count):
    """A block f32 [count, 16] of zeros that begins at a cache line, so that none of its values lies in two of them."""
    flat = np.zeros((count + 1) * LANES, np.float32)
    skip = -(flat.ctypes.data // flat.itemsize) % LANES
    return flat[skip : skip + count * LANES].reshape(count, LANES)


def lined_up_room(*shape: int) -> NDArray[np.float32]:
    """An f32 array, not yet filled, that begins at a cache line. It is numpy's, who asks for large pages."""
    count = math.prod(shape)
    flat = np.empty(count + LANES, np.float32)
    skip = -(flat.ctypes.data // flat.itemsize) % LANES
    return flat[skip : skip + count].reshape(shape)


@compiled
def lined_up(matrix):
    """A copy f32 [n, K + 16] of an f32 matrix [n, K], K a multiple of 16, whose rows begin at cache lines.

    The last columns are zeros. Rows that are a power of two apart would share a few sets of the innermost cache.
    """
    count, width = matrix.shape
    copy = block_of(count * (width // LANES + 1)).reshape(count, width + LANES)
    copy[:, :width] = matrix
    return copy


@inlined
def gather(rows, first, column, block):
    """Copy rows[first:first+16, column:column+256] (f32) into block; lanes beyond the last row become 0."""
    count = min(LANES, rows.shape[0] - first)
    for r in range(count):
        for i in range(block.shape[0]):
            block[i, r] = rows[first + r, column + i]
    for r in range(count, LANES):
        for i in range(block.shape[0]):
            block[i, r] = 0.0


@inlined
def copy(source, first, count, out, at):
    """out[at + i] = source[first + i] for i < count, of two blocks."""
    for i in range(count):
        store(out, at + i, load(source, first + i))


@compiled
def scatter(block, rows, first):
    """Copy block into rows [R, 256] of any type, leaving out lanes beyond the last row."""
    for r in range(min(LANES, rows.shape[0] - first)):
        for i in range(block.shape[0]):
            rows[first + r, i] = rows.dtype.type(block[i, r])


@inlined
def scatter_at(block, rows, first, column):
    """Copy block into rows[first:first+16, column:column+256] (f32), leaving out lanes beyond the last row."""
    for r in range(min(LANES, rows.shape[0] - first)):
        for i in range(block.shape[0]):
            rows[first + r, column + i] = block[i, r]


@inlined
def product(out, at, factors, row, errors, count):
    """out[at + n] -= Σ_b factors[row + n, b] · errors[b] for b < count, ascending, and n in 0..7, in 16 lanes.

    The eight sums stay in registers, and each row of errors is loaded once for all of them.
    """
    s0 = load(out, at)
    s1 = load(out, at + 1)
    s2 = load(out, at + 2)
    s3 = load(out, at + 3)
    s4 = load(out, at + 4)
    s5 = load(out, at + 5)
    s6 = load(out, at + 6)
    s7 = load(out, at + 7)
    for b in range(count):
        e = load(errors, b)
        s0 = fma(splat(-factors[row, b]), e, s0)
        s1 = fma(splat(-factors[row + 1, b]), e, s1)
        s2 = fma(splat(-factors[row + 2, b]), e, s2)
        s3 = fma(splat(-factors[row + 3, b]), e, s3)
        s4 = fma(splat(-factors[row + 4, b]), e, s4)
        s5 = fma(splat(-factors[row + 5, b]), e, s5)
        s6 = fma(splat(-factors[row + 6, b]), e, s6)
        s7 = fma(splat(-factors[row + 7, b]), e, s7)
    store(out, at, s0)
    store(out, at + 1, s1)
    store(out, at + 2, s2)
    store(out, at + 3, s3)
    store(out, at + 4, s4)
    store(out, at + 5, s5)
    store(out, at + 6, s6)
    store(out, at + 7, s7)


@compiled
def hadamard(block):
    """The unnormalised Walsh-Hadamard transform of every lane, two stages at a time, in place."""
    stride = 1
    while stride < GROUP:
        for base in range(0, GROUP, 4 * stride):
            for i in range(base, base + stride):
                a = load(block, i)
                b = load(block, i + stride)
                c = load(block, i + 2 * stride)
                d = load(block, i + 3 * stride)
                ab = a + b
                a_b = a - b
                cd = c + d
                c_d = c - d
                store(block, i, ab + cd)
                store(block, i + stride, a_b + c_d)
                store(block, i + 2 * stride, ab - cd)
                store(block, i + 3 * stride, a_b - c_d)
        stride *= 4


@compiled
def sort_lanes(block):
    """Sort every lane ascending, in place, by a network of compare-and-swap steps.

    Source: Batcher, "Sorting networks and their applications" (1968), the odd-even merge sort.
    """
    merged = 1
    while merged < GROUP:
        stride = merged
        while stride >= 1:
            for base in range(stride % merged, GROUP - stride, 2 * stride):
                for i in range(base, base + stride):
                    if i // (2 * merged) == (i + stride) // (2 * merged):
                        a = load(block, i)
                        b = load(block, i + stride)
                        store(block, i, where_gt(a, b, b, a))
                        store(block, i + stride, where_gt(a, b, a, b))
            stride //= 2
        merged *= 2


@inlined
def midpoints(levels, mids):
    """mids [K-1, 16] halfway between neighbouring levels [K, 16]."""
    half = splat(np.float32(0.5))
    for k in range(levels.shape[0] - 1):
        store(mids, k, half * (load(levels, k) + load(levels, k + 1)))


@inlined
def assign(target, levels, mids, codes, i):
    """The level nearest to `target` (16 lanes), of two the lower one; its index goes to codes[i]."""
    value = load(levels, 0)
    code = splat(np.float32(0))
    for k in range(mids.shape[0]):
        mid = load(mids, k)
        value = where_gt(target, mid, load(levels, k + 1), value)
        code = where_gt(target, mid, splat(np.float32(k + 1)), code)
    store(codes, i, code)
    return value


@compiled
def sort_levels(levels, codes):
    """Make every lane's levels [K, 16] ascending, and let codes [256, 16] follow."""
    count = levels.shape[0]
    rank = np.empty(count, np.float32)
    order = np.empty(count, np.float32)
    for r in range(LANES):
        ascending = True
        for k in range(count - 1):
            ascending = ascending and levels[k, r] <= levels[k + 1, r]
        if ascending:
            continue
        for k in range(count):
            before = 0
            for other in range(count):
                smaller = levels[other, r] < levels[k, r]
                tied = levels[other, r] == levels[k, r] and other < k
                before += 1 if smaller or tied else 0
            rank[k] = before
            order[before] = levels[k, r]
        for k in range(count):
            levels[k, r] = order[k]
        for i in range(GROUP):
            codes[i, r] = rank[int(codes[i, r])]
