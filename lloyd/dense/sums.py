"""Sums of the rows of a dense H by code, kept for each row: refits take their equations from them.

They are added up once. Then only columns that moved change them: of 256 about sixteen in a round. Every sum over
columns is taken in sixteen parts, those of columns that lie sixteen apart, and the parts as a tree.
"""

from __future__ import annotations

import numpy as np

from ..codes.descent import BLOCKS, CODE
from ..constants import GROUP
from ..levels.refit import multiply, solve, solve_grid
from ..loops import compiled, inlined
from ..simd.vec import LANES, first_outside, fma, load, splat, store, tree, where_eq
from .tile import to_rows

HALF = GROUP // 2


@compiled
def members(codes, order, bounds):
    """List each lane's columns by code, ascending, in order u8 [16, 256].

    bounds i64 [16, K, 3] receives where each code's list begins, where it leaves the first half of the columns, and
    where it ends.
    """
    count = bounds.shape[1]
    numbers = np.empty((2 * count, LANES), np.float32)
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    for part in range(2):
        for k in range(count):
            wanted, total = splat(np.float32(k)), zero
            for i in range(part * HALF, part * HALF + HALF):
                total = total + where_eq(load(codes, i), wanted, one, zero)
            store(numbers, part * count + k, total)
    places = np.empty((count, LANES), np.int64)
    for r in range(LANES):
        start = 0
        for k in range(count):
            places[k, r] = start
            bounds[r, k, 0] = start
            bounds[r, k, 1] = start + int(numbers[k, r])
            start = bounds[r, k, 1] + int(numbers[count + k, r])
            bounds[r, k, 2] = start
    for i in range(GROUP):
        for r in range(LANES):
            k = np.uint32(codes[i, r])
            order[r, places[k, r]] = i
            places[k, r] += 1


@inlined
def row_sums(matrix, ones, order, bounds, sums):
    """sums f32 [16 · K · 16, 16]: for each lane and code, the sum of the matrix's rows on its list, in its order; for
    code K / 2, which most columns have, what the others leave of `ones` f32 [16, 16], the sum of all rows.

    The loop takes 64 columns of half the rows at a time, for all lanes: so much of the matrix fits the innermost cache.
    """
    width, count, pitch = GROUP // LANES, bounds.shape[1], matrix.shape[1] // LANES
    lines, out = matrix.reshape(GROUP * pitch, LANES), sums
    sums[:] = 0.0
    for half in range(2):
        for tile in range(0, width, 4):
            for r in range(LANES):
                for k in range(count):
                    if k == count // 2:
                        continue
                    at = (r * count + k) * width + tile
                    s0 = load(out, at)
                    s1 = load(out, at + 1)
                    s2 = load(out, at + 2)
                    s3 = load(out, at + 3)
                    for n in range(bounds[r, k, half], bounds[r, k, half + 1]):
                        line = order[r, n] * pitch + tile
                        s0 = s0 + load(lines, line)
                        s1 = s1 + load(lines, line + 1)
                        s2 = s2 + load(lines, line + 2)
                        s3 = s3 + load(lines, line + 3)
                    store(out, at, s0)
                    store(out, at + 1, s1)
                    store(out, at + 2, s2)
                    store(out, at + 3, s3)
    for r in range(LANES):
        first = r * count * width
        for b in range(width):
            left = load(ones, b)
            for k in range(count):
                if k != count // 2:
                    left = left - load(out, first + k * width + b)
            store(out, first + count // 2 * width + b, left)


@compiled
def add_up(dense, codes, t):
    """The sums of a tile, all anew, from a block of lanes of codes."""
    if dense.grid:
        multiply(dense.matrix, codes, t.lanes)
        to_rows(t.lanes, np.float32(-1), t.sums)
        return
    order = np.empty((LANES, GROUP), np.uint8)
    bounds = np.empty((LANES, t.levels.shape[0], 3), np.int64)
    members(codes, order, bounds)
    row_sums(dense.matrix, dense.ones, order, bounds, t.sums)


@inlined
def follow(dense, t, r):
    """Let the sums and codes of row r follow the columns that have moved in t.row, ascending."""
    count, at, half = t.levels.shape[0], r * BLOCKS, splat(np.float32(0.5))
    lines, pitch, sums = dense.columns.lines, dense.columns.pitch, t.sums
    for b in range(BLOCKS):
        old, new = load(t.codes, at + b), load(t.row, CODE + b)
        lane = first_outside(new, old - half, old + half, 0)
        while lane < LANES:
            line = (b * LANES + lane) * pitch
            was, now = t.codes[at + b, lane], t.row[CODE + b, lane]
            if dense.grid:
                step = splat(now - was)
                for i in range(BLOCKS):
                    store(sums, at + i, fma(step, load(lines, line + i), load(sums, at + i)))
            else:
                out, into = (r * count + int(was)) * BLOCKS, (r * count + int(now)) * BLOCKS
                for i in range(BLOCKS):
                    value = load(lines, line + i)
                    store(sums, out + i, load(sums, out + i) - value)
                    store(sums, into + i, load(sums, into + i) + value)
            lane = first_outside(new, old - half, old + half, lane + 1)
        store(t.codes, at + b, new)


@inlined
def equations(dense, t, r):
    """Row r's gram [n, n, 16] (of a codebook the lower part) and rhs [n, 16], K a multiple of 4.

    Sums over the columns of a code leave the others out, which is as if these added zeros: a sum that begins with zero
    never becomes -0.
    """
    count, at = t.levels.shape[0], r * BLOCKS
    zero = splat(np.float32(0))
    if dense.grid:
        b0, b1, g10, g11 = zero, zero, zero, zero
        for b in range(BLOCKS):
            codes, ys, turned = load(t.codes, at + b), load(t.ys, at + b), load(t.sums, at + b)
            b0 = b0 + ys
            b1 = fma(ys, codes, b1)
            g10 = g10 + turned
            g11 = fma(turned, codes, g11)
        t.rhs[0, r], t.rhs[1, r] = tree(b0), tree(b1)
        t.gram[0, 0, r], t.gram[1, 0, r], t.gram[1, 1, r] = dense.total, tree(g10), tree(g11)
        return
    for m in range(0, count, 2):
        this, following = splat(np.float32(m)), splat(np.float32(m + 1))
        r0, r1 = zero, zero
        for b in range(BLOCKS):
            codes, ys = load(t.codes, at + b), load(t.ys, at + b)
            r0 = where_eq(codes, this, r0 + ys, r0)
            r1 = where_eq(codes, following, r1 + ys, r1)
        t.rhs[m, r], t.rhs[m + 1, r] = tree(r0), tree(r1)
        for k in range(m - m % 4, count, 4):
            a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
            first = (r * count + k) * BLOCKS
            for b in range(BLOCKS):
                codes = load(t.codes, at + b)
                s0, s1 = load(t.sums, first + b), load(t.sums, first + BLOCKS + b)
                s2, s3 = load(t.sums, first + 2 * BLOCKS + b), load(t.sums, first + 3 * BLOCKS + b)
                a0, b0 = where_eq(codes, this, a0 + s0, a0), where_eq(codes, following, b0 + s0, b0)
                a1, b1 = where_eq(codes, this, a1 + s1, a1), where_eq(codes, following, b1 + s1, b1)
                a2, b2 = where_eq(codes, this, a2 + s2, a2), where_eq(codes, following, b2 + s2, b2)
                a3, b3 = where_eq(codes, this, a3 + s3, a3), where_eq(codes, following, b3 + s3, b3)
            t.gram[k, m, r], t.gram[k, m + 1, r] = tree(a0), tree(b0)
            t.gram[k + 1, m, r], t.gram[k + 1, m + 1, r] = tree(a1), tree(b1)
            t.gram[k + 2, m, r], t.gram[k + 2, m + 1, r] = tree(a2), tree(b2)
            t.gram[k + 3, m, r], t.gram[k + 3, m + 1, r] = tree(a3), tree(b3)


@inlined
def refit(dense, t):
    """Move the levels of a tile to where its equations have them."""
    if dense.grid:
        solve_grid(t.gram, t.rhs, t.levels, t.line)
    else:
        solve(t.gram, t.rhs, t.levels)
        sort(t)


@compiled
def sort(t):
    """Make every row's levels ascending, and let its codes and sums follow."""
    count = t.levels.shape[0]
    rank, order = np.empty(count, np.int64), np.empty(count, np.float32)
    for r in range(LANES):
        ascending = True
        for k in range(count - 1):
            ascending = ascending and t.levels[k, r] <= t.levels[k + 1, r]
        if ascending:
            continue
        for k in range(count):
            before = 0
            for other in range(count):
                smaller = t.levels[other, r] < t.levels[k, r]
                tied = t.levels[other, r] == t.levels[k, r] and other < k
                before += 1 if smaller or tied else 0
            rank[k] = before
            order[before] = t.levels[k, r]
        first = r * count * BLOCKS
        t.spare[:] = t.sums[first : first + count * BLOCKS]
        for k in range(count):
            t.levels[k, r] = order[k]
            for b in range(BLOCKS):
                store(t.sums, first + rank[k] * BLOCKS + b, load(t.spare, k * BLOCKS + b))
        for b in range(r * BLOCKS, r * BLOCKS + BLOCKS):
            for lane in range(LANES):
                t.codes[b, lane] = rank[int(t.codes[b, lane])]
