"""Coordinate descent on (y-q)ᵀ H (y-q), row by row: each column takes the level that is best given all others.

A row keeps its pull H·(y-q), sixteen columns a value, so that a column which stays costs next to nothing and one that
moves adds one row of H. Warm sweeps shift every target by a share of the row's own error, up or down as a fixed table
says: some columns then leave the minimum that plain sweeps end in, and the sweeps without it that follow find a lower
one (annealing, with the same noise in every row). Depends on formats (the signs), lanes, vec and numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..formats.fwht import draw_signs
from .lanes import GROUP
from .vec import LANES, first_difference, fma, load, root, splat, store, where_eq, where_gt

SHAKE = np.float32(0.25)
"""How far warm sweeps shift a target, as a share of the root mean square error of a row's columns under H."""
SHAKE_SEED = 77
SWEEPS = 8
"""Sweeps of a round of descent."""
BLOCKS = GROUP // LANES
_MOST = np.float32(1e38)


def shake_signs(sweeps: int) -> NDArray[np.float32]:
    """±1 f32 [sweeps, 16, 16]: which way each warm sweep shifts each column, the same for every row and group."""
    return draw_signs(SHAKE_SEED, sweeps * GROUP).reshape(sweeps, BLOCKS, LANES)


@njit(cache=True, nogil=True)
def heat(errors, pull, share, out):
    """out f32 [1, 16] = share · √((y-q)ᵀ H (y-q) / 256) of errors y-q and pull H·(y-q), both [256, 16].

    Eight columns at a time are summed in order, the thirty-two sums as a tree.
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
    # Neither what rounding has driven below zero nor what has overflown is a temperature.
    energy = where_gt(splat(_MOST), energy, energy, nothing)
    store(out, 0, splat(share) * root(where_gt(energy, nothing, energy, nothing)))


@njit(cache=True, nogil=True)
def sweep(values, codes, pull, levels, mids, lines, inverse, signs, shift):
    """One sweep over a row, and how many columns moved; values, codes and pull f32 [16, 16] are kept up to date.

    levels f32 [K], mids f32 [K-1]; `lines` f32 [4096, 16] are the rows of H, `inverse` f32 [16, 16] holds 1 / H_jj.
    """
    moves = np.empty((2, LANES), np.float32)
    for lane in range(LANES):
        moves[1, lane] = lane
    numbers = load(moves, 1)
    count = 0
    for block in range(BLOCKS):
        start = 0
        while start < LANES:
            now = load(values, block)
            target = now + load(pull, block) * load(inverse, block) + splat(shift) * load(signs, block)
            value = splat(levels[0])
            code = splat(np.float32(0))
            for k in range(mids.shape[0]):
                mid = splat(mids[k])
                value = where_gt(target, mid, splat(levels[k + 1]), value)
                code = where_gt(target, mid, splat(np.float32(k + 1)), code)
            lane = first_difference(value, now, start)
            if lane == LANES:
                break
            store(moves, 0, now - value)
            moved = splat(moves[0, lane])
            here = splat(np.float32(lane))
            store(values, block, where_eq(numbers, here, value, now))
            store(codes, block, where_eq(numbers, here, code, load(codes, block)))
            line = (block * LANES + lane) * BLOCKS
            for i in range(BLOCKS):
                store(pull, i, fma(load(lines, line + i), moved, load(pull, i)))
            start = lane + 1
            count += 1
    return count


@njit(cache=True, nogil=True)
def descend(codes, pull, levels, matrix, signs, first, sweeps, shifts):
    """Sweeps number first to first + sweeps over each lane's row, given levels [K, 16], ascending.

    codes [256, 16] are changed; pull [256, 16] holds H·(y-q) before; shifts f32 [1, 16] is the lanes' heat, 0 for none.
    """
    count = levels.shape[0]
    lines = matrix.reshape(GROUP * BLOCKS, LANES)
    row_levels = np.empty(count, np.float32)
    mids = np.empty(count - 1, np.float32)
    row_values = np.empty((BLOCKS, LANES), np.float32)
    row_codes = np.empty((BLOCKS, LANES), np.float32)
    row_pull = np.empty((BLOCKS, LANES), np.float32)
    inverse = np.empty((BLOCKS, LANES), np.float32)
    for i in range(GROUP):
        inverse[i // LANES, i % LANES] = np.float32(1) / matrix[i, i]
    for r in range(LANES):
        for k in range(count):
            row_levels[k] = levels[k, r]
        for k in range(count - 1):
            mids[k] = np.float32(0.5) * (row_levels[k] + row_levels[k + 1])
        for i in range(GROUP):
            code = codes[i, r]
            row_codes[i // LANES, i % LANES] = code
            row_values[i // LANES, i % LANES] = row_levels[int(code)]
            row_pull[i // LANES, i % LANES] = pull[i, r]
        shift = shifts[0, r]
        for s in range(first, first + sweeps):
            moved = sweep(row_values, row_codes, row_pull, row_levels, mids, lines, inverse, signs[s], shift)
            if moved == 0 and shift == 0.0:
                break
        for i in range(GROUP):
            codes[i, r] = row_codes[i // LANES, i % LANES]
