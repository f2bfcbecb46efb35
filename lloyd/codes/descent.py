"""Coordinate descent on (y-q)ᵀ H (y-q), row by row: each column takes the level that is best given all others.

Of each row the loop keeps the pull H·(y-q), and for each column the bounds of the targets at which it stays; sixteen
columns are compared at once. So a column that stays costs next to nothing, and one that moves adds a row of H to the
pull. Warm sweeps shift every target by a share of the row's own error, up or down as a fixed table says. Some columns
then leave the minimum in which plain sweeps end, and the plain sweeps that follow find a lower one. This is annealing,
with the same noise in every row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...formats.fwht import draw_signs
from ..constants import GROUP, MOST_ENERGY, SHAKE_SEED
from ..loops import compiled
from ..simd.vec import LANES, count_gt, first_outside, fma, load, pick, root, splat, store, where_gt

BLOCKS = GROUP // LANES
CODE, LOW, HIGH = BLOCKS, 2 * BLOCKS, 3 * BLOCKS
"""Where a row's codes and bounds begin, behind its levels."""


def shake_signs(sweeps: int) -> NDArray[np.float32]:
    """±1 f32 [sweeps, 16, 16]: which way each warm sweep shifts each column, the same for every row and group."""
    return draw_signs(SHAKE_SEED, sweeps * GROUP).reshape(sweeps, BLOCKS, LANES)


class Codebook(NamedTuple):
    """One row's levels f32 [K], ascending. `mids` f32 [n, 16] are their midpoints, then infinity; `edges` f32 [K+1] are
    the midpoints between two infinities, so that edges[k] and edges[k + 1] bound the targets of level k.
    """

    levels: NDArray[np.float32]
    mids: NDArray[np.float32]
    edges: NDArray[np.float32]


class Columns(NamedTuple):
    """What every row's descent has in common, sixteen columns a value: row j of H begins at value j · `pitch` of
    `lines`; inverse f32 [16, 16] holds 1 / H_jj; signs f32 [16 · sweeps, 16] say which way warm sweeps shift targets.
    """

    lines: NDArray[np.float32]
    pitch: int
    inverse: NDArray[np.float32]
    signs: NDArray[np.float32]


@compiled
def heat(errors, pull, share, out):
    """out f32 [1, 16] = share · √((y-q)ᵀ H (y-q) / 256) of errors y-q and pull H·(y-q), both [256, 16].

    Each run of eight columns is summed in order, then the 32 sums as a tree.
    """
    parts = np.empty((GROUP // 8, LANES), np.float32)
    nothing = splat(np.float32(0))
    for part in range(GROUP // 8):
        total = nothing
        for i in range(8 * part, 8 * part + 8):
            total = fma(load(errors, i), load(pull, i), total)
        store(parts, part, total)
    width = GROUP // 16
    while width >= 1:
        for part in range(width):
            store(parts, part, load(parts, part) + load(parts, part + width))
        width //= 2
    energy = load(parts, 0) * splat(np.float32(1) / np.float32(GROUP))
    # Rounding may drive an energy below zero, and a large one overflows: neither shifts anything.
    energy = where_gt(splat(MOST_ENERGY), energy, energy, nothing)
    store(out, 0, splat(share) * root(where_gt(energy, nothing, energy, nothing)))


@compiled
def sweep_row(row, pull, book, columns, first, sweeps, shift):
    """Sweeps number first to first + sweeps over one row, whose `row` and pull f32 [16, 16] are kept up to date.

    `row` f32 [64, 16] holds, sixteen columns a value, their levels, their codes, and the bounds (low, high] of the
    targets that keep them. `shift` f32 is the row's heat.
    """
    levels, mids, edges = book.levels, book.mids, book.edges
    lines, pitch, inverse, signs = columns.lines, columns.pitch, columns.inverse, columns.signs
    for s in range(first, first + sweeps):
        still = True
        for block in range(BLOCKS):
            now, low, high = load(row, block), load(row, LOW + block), load(row, HIGH + block)
            pulled, scale = load(pull, block), load(inverse, block)
            shifted = splat(shift) * load(signs, s * BLOCKS + block)
            target = now + pulled * scale + shifted
            lane = first_outside(target, low, high, 0)
            while lane < LANES:
                wanted = splat(pick(target, lane))
                code = count_gt(wanted, load(mids, 0))
                for i in range(1, mids.shape[0]):
                    code += count_gt(wanted, load(mids, i))
                level, before = levels[code], row[block, lane]
                if level != before:  # else another code of the same level
                    row[block, lane], row[CODE + block, lane] = level, code
                    row[LOW + block, lane], row[HIGH + block, lane] = edges[code], edges[code + 1]
                    moved = splat(before - level)
                    line = (block * LANES + lane) * pitch
                    pulled = fma(load(lines, line + block), moved, pulled)
                    for i in range(BLOCKS):
                        store(pull, i, fma(load(lines, line + i), moved, load(pull, i)))
                    target = now + pulled * scale + shifted
                    still = False
                lane = first_outside(target, low, high, lane + 1)
        if still and shift == 0.0:
            break


@compiled
def descend(codes, pull, levels, matrix, signs, first, sweeps, shifts):
    """Sweeps number first to first + sweeps over each lane's row, given levels [K, 16], ascending.

    codes [256, 16] are changed; pull [256, 16] holds H·(y-q) before; shifts f32 [1, 16] is the lanes' heat, 0 for none.
    """
    count = levels.shape[0]
    row_levels = np.empty(count, np.float32)
    mids = np.full(((count + LANES - 2) // LANES, LANES), np.inf, np.float32)
    edges = np.empty(count + 1, np.float32)
    edges[0], edges[count] = -np.inf, np.inf
    row = np.empty((4 * BLOCKS, LANES), np.float32)
    row_pull = np.empty((BLOCKS, LANES), np.float32)
    inverse = np.empty((BLOCKS, LANES), np.float32)
    for i in range(GROUP):
        inverse[i // LANES, i % LANES] = np.float32(1) / matrix[i, i]
    book = Codebook(row_levels, mids, edges)
    pitch = matrix.shape[1] // LANES
    lines, lined_signs = matrix.reshape(GROUP * pitch, LANES), signs.reshape(signs.shape[0] * BLOCKS, LANES)
    columns = Columns(lines, pitch, inverse, lined_signs)
    for r in range(LANES):
        for k in range(count):
            row_levels[k] = levels[k, r]
        for k in range(count - 1):
            edges[k + 1] = np.float32(0.5) * (row_levels[k] + row_levels[k + 1])
            mids[k // LANES, k % LANES] = edges[k + 1]
        for i in range(GROUP):
            block, lane, code = i // LANES, i % LANES, int(codes[i, r])
            row[block, lane] = row_levels[code]
            row[CODE + block, lane] = code
            row[LOW + block, lane] = edges[code]
            row[HIGH + block, lane] = edges[code + 1]
            row_pull[block, lane] = pull[i, r]
        sweep_row(row, row_pull, book, columns, first, sweeps, shifts[0, r])
        for i in range(GROUP):
            codes[i, r] = row[CODE + i // LANES, i % LANES]
