"""What the loops under a dense H work on: the H of a group, and sixteen rows at a time.

A block of rows f32 [256, 16] holds row after row, sixteen columns a value: value 16·r + b is columns 16·b to 16·b + 15
of row r. In a block of lanes, as products take it, value i is column i of sixteen rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..codes.descent import BLOCKS, CODE, HIGH, LOW, Codebook, Columns
from ..constants import F16_MAX, GROUP
from ..loops import compiled, inlined
from ..simd.lanes import block_of, lined_up
from ..simd.vec import LANES, fma, load, splat, store, where_eq

F32 = NDArray[np.float32]

LARGEST = np.float32(F16_MAX)
SMALLEST_NORMAL = np.float32(2.0**-14)
TINY_ROUNDER = np.float32(0.75)
"""The spacing of f32 at 0.75 is that of the smallest f16."""


class Dense(NamedTuple):
    """A group's H: `matrix` f32 [256, 272] as `lined_up` leaves it, what descent needs of it, and `ones` f32 [16, 16],
    H · 1. `grid` keeps levels evenly spaced, and `total` is the sum over H, which only a grid needs.
    """

    matrix: F32
    columns: Columns
    ones: F32
    total: np.float32
    grid: bool


class Tile(NamedTuple):
    """Sixteen rows under way. y are their targets, ys H · y, and codes whole numbers, all blocks of rows.

    With n unknowns, K or 2 for a grid: levels [K, 16]; line [2, 16], zero and scale of a grid; gram [n, n, 16], rhs
    [n, 16]. `sums` f32 [16 · m · 16, 16] holds for each row m sums over rows of H: for each of K codes those of its
    columns, or for a grid H · codes alone. `row` and `pull` are those of the row that descends, as `sweep_row` takes
    them; `book` are its levels. lanes and more are blocks of lanes for products; spare [m · 16, 16].
    """

    y: F32
    ys: F32
    codes: F32
    levels: F32
    line: F32
    gram: F32
    rhs: F32
    sums: F32
    row: F32
    pull: F32
    book: Codebook
    lanes: F32
    more: F32
    spare: F32


@compiled
def dense_of(matrix, shakes, grid):
    """The H f32 [256, 256] of a group as the loops take it; shakes as in Problem."""
    lined = lined_up(matrix)
    pitch = lined.shape[1] // LANES
    lines = lined.reshape(GROUP * pitch, LANES)
    inverse, ones, signs = block_of(BLOCKS), block_of(BLOCKS), block_of(shakes.shape[0] * BLOCKS)
    signs[:] = shakes.reshape(signs.shape)
    total = np.float32(0)
    for i in range(GROUP):
        inverse[i // LANES, i % LANES] = np.float32(1) / matrix[i, i]
        for b in range(BLOCKS):
            store(ones, b, load(ones, b) + load(lines, i * pitch + b))
        for j in range(GROUP if grid else 0):
            total += matrix[i, j]
    columns = Columns(lines, pitch, inverse, signs)
    return Dense(lined, columns, ones, total, grid)


@compiled
def tile_for(count, grid):
    """Scratch for sixteen rows of `count` levels, or of a grid of so many."""
    unknowns, kept = (2, 1) if grid else (count, count)
    edges = np.empty(count + 1, np.float32)
    edges[0], edges[count] = -np.inf, np.inf
    mids = block_of((count + LANES - 2) // LANES)
    mids[:] = np.inf
    return Tile(
        block_of(GROUP),
        block_of(GROUP),
        block_of(GROUP),
        block_of(count),
        block_of(2),
        block_of(unknowns * unknowns).reshape(unknowns, unknowns, LANES),
        block_of(unknowns),
        block_of(LANES * kept * BLOCKS),
        block_of(4 * BLOCKS),
        block_of(BLOCKS),
        Codebook(np.empty(count, np.float32), mids, edges),
        block_of(GROUP),
        block_of(GROUP),
        block_of(kept * BLOCKS),
    )


@inlined
def to_rows(lanes, sign, rows):
    """The block of rows that is `sign` times a block of lanes."""
    for b in range(BLOCKS):
        for r in range(LANES):
            for lane in range(LANES):
                rows[r * BLOCKS + b, lane] = sign * lanes[b * LANES + lane, r]


@inlined
def gather_rows(rows, first, column, block):
    """block of rows = rows[first:first+16, column:column+256] of any type; rows beyond the last one become 0."""
    count = min(LANES, rows.shape[0] - first)
    for r in range(count):
        for i in range(GROUP):
            block[r * BLOCKS + i // LANES, i % LANES] = rows[first + r, column + i]
    for i in range(count * BLOCKS, GROUP):
        for lane in range(LANES):
            block[i, lane] = 0.0


@inlined
def gather_params(params, first, grid, t):
    """Levels, and zero and scale, of a tile from params f32 [R, n], the levels or (zero, scale) of each row."""
    for r in range(min(LANES, params.shape[0] - first)):
        if grid:
            t.line[0, r], t.line[1, r] = params[first + r, 0], params[first + r, 1]
        else:
            for k in range(params.shape[1]):
                t.levels[k, r] = params[first + r, k]
    if grid:
        even(t)


@inlined
def even(t):
    """Levels of a grid from its zero and scale."""
    for k in range(t.levels.shape[0]):
        store(t.levels, k, load(t.line, 0) + load(t.line, 1) * splat(np.float32(k)))


@inlined
def scatter_row(t, r, params, codes, at):
    """Row r of a tile becomes row `at` of params f32 [R, n]; codes u8 [R, 256] get those of t.row."""
    for n in range(params.shape[1]):
        params[at, n] = t.line[n, r] if params.shape[1] == 2 else t.levels[n, r]
    for i in range(GROUP):
        codes[at, i] = np.uint8(t.row[CODE + i // LANES, i % LANES])


@inlined
def to_stored(grid, t):
    """Round levels to what the file holds: f16, or zero and scale of the line through a grid's first and last level."""
    if not grid:
        round_halves(t.levels)
        return
    last = t.levels.shape[0] - 1
    for r in range(LANES):
        step = (np.float64(t.levels[last, r]) - np.float64(t.levels[0, r])) / last
        t.line[0, r], t.line[1, r] = t.levels[0, r], np.float32(step)
    even(t)


@inlined
def round_halves(values):
    """Round f32 values [n, 16] to the nearest f16, ties to even; those beyond its range become its largest."""
    bits = values.view(np.int32)
    for k in range(values.shape[0]):
        for r in range(values.shape[1]):
            value = values[k, r]
            if value > LARGEST:
                values[k, r] = LARGEST
            elif value < -LARGEST:
                values[k, r] = -LARGEST
            sign = bits[k, r] & np.int32(-0x80000000)
            size = abs(values[k, r])
            if size < SMALLEST_NORMAL:
                values[k, r] = (size + TINY_ROUNDER) - TINY_ROUNDER
                bits[k, r] |= sign
            else:
                found = bits[k, r]
                bits[k, r] = (found + np.int32(0xFFF) + ((found >> 13) & np.int32(1))) & np.int32(~0x1FFF)


@inlined
def begin(dense, t, r):
    """Row r of a tile becomes the one that descends: its levels, its codes, and the bounds of its targets."""
    count, book, at = t.levels.shape[0], t.book, r * BLOCKS
    for k in range(count):
        book.levels[k] = t.levels[k, r]
    for k in range(count - 1):
        book.edges[k + 1] = np.float32(0.5) * (book.levels[k] + book.levels[k + 1])
        book.mids[k // LANES, k % LANES] = book.edges[k + 1]
    zero, scale = splat(t.line[0, r]), splat(t.line[1, r])
    one, half = splat(np.float32(1)), splat(np.float32(0.5))
    for b in range(BLOCKS):
        codes = load(t.codes, at + b)
        store(t.row, CODE + b, codes)
        if dense.grid:
            level = zero + scale * codes
            low = half * (zero + scale * (codes - one) + level)
            low = where_eq(codes, splat(np.float32(0)), splat(book.edges[0]), low)
            high = half * (level + (zero + scale * (codes + one)))
            high = where_eq(codes, splat(np.float32(count - 1)), splat(book.edges[count]), high)
        else:
            level, low, high = splat(book.levels[0]), splat(book.edges[0]), splat(book.edges[1])
            for k in range(1, count):
                this = splat(np.float32(k))
                level = where_eq(codes, this, splat(book.levels[k]), level)
                low = where_eq(codes, this, splat(book.edges[k]), low)
                high = where_eq(codes, this, splat(book.edges[k + 1]), high)
        store(t.row, b, level)
        store(t.row, LOW + b, low)
        store(t.row, HIGH + b, high)


@inlined
def add_decoded(dense, t, r, sign, block, at):
    """block[at + b] += sign · H · (what row r stands for), b from 0 to 15, from the sums over rows of H."""
    count = t.levels.shape[0]
    for b in range(BLOCKS):
        value = load(block, at + b)
        if dense.grid:
            value = fma(splat(sign * t.line[0, r]), load(dense.ones, b), value)
            value = fma(splat(sign * t.line[1, r]), load(t.sums, r * BLOCKS + b), value)
        else:
            for k in range(count):
                value = fma(splat(sign * t.levels[k, r]), load(t.sums, (r * count + k) * BLOCKS + b), value)
        store(block, at + b, value)


@inlined
def pull_of(dense, t, r):
    """The pull H · (y - q) of row r."""
    for b in range(BLOCKS):
        store(t.pull, b, load(t.ys, r * BLOCKS + b))
    add_decoded(dense, t, r, np.float32(-1), t.pull, 0)
