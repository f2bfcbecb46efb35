"""A group of all rows under a dense H: error feedback, rounds of descent and refit, and codes for the stored levels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..codes.descent import BLOCKS, sweep_row
from ..codes.feedback import feedback
from ..constants import GROUP, MOST_ENERGY, SIGNAL_FLOOR, SWEEPS
from ..levels.refit import multiply
from ..loops import compiled, inlined
from ..simd.lanes import block_of, gather, midpoints
from ..simd.vec import LANES, fma, load, splat, tree
from .sums import add_up, equations, follow, refit
from .tile import (
    begin,
    dense_of,
    gather_params,
    gather_rows,
    pull_of,
    scatter_row,
    tile_for,
    to_rows,
    to_stored,
)


class Room(NamedTuple):
    """Blocks of lanes f32 [256, 16]: sixteen rows' targets, the errors of those rounded, and their codes; and f32
    [K - 1, 16] the midpoints of their levels.
    """

    y: NDArray[np.float32]
    errors: NDArray[np.float32]
    codes: NDArray[np.float32]
    mids: NDArray[np.float32]


@compiled
def fit_dense(rows, column, matrix, factor, signs, shakes, sweeps, count, params_io, codes_out, gains):
    """Codes u8 [R, 256] and stored levels of the group at `column` of rows f32 [R, K_in] under H, `matrix` f32
    [256, 256] with its feedback `factor`.

    params_io f32 [R, n] holds the initial levels, or (zero, scale) of `count` levels, and receives those that are
    stored. There is a round of so many sweeps and a refit for each of shakes f32 [m], warm where that is not 0, with
    the directions `signs` f32 [m, 16, 16]. gains f32 [R] receives each row's (yᵀH y)/(yᵀH ŷ) as gain_of has it;
    nothing where it is empty.
    """
    grid = params_io.shape[1] == 2
    dense, t = dense_of(matrix, signs, grid), tile_for(count, grid)
    room = Room(block_of(GROUP), block_of(GROUP), block_of(GROUP), block_of(count - 1))
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, room.y)
        gather_rows(rows, first, column, t.y)
        fit_tile(dense, t, room, first, factor, shakes, sweeps, params_io, codes_out, gains)


@inlined
def fit_tile(dense, t, room, first, factor, shakes, sweeps, params_io, codes_out, gains):
    """The sixteen rows from `first` on of `fit_dense`, whose targets are those of room.y and t.y."""
    gather_params(params_io, first, dense.grid, t)
    multiply(dense.matrix, room.y, t.lanes)
    to_rows(t.lanes, np.float32(-1), t.ys)
    midpoints(t.levels, room.mids)
    feedback(room.y, factor, t.levels, room.mids, room.codes, t.more, room.errors)
    to_rows(room.codes, np.float32(1), t.codes)
    add_up(dense, room.codes, t)
    for r in range(LANES):
        equations(dense, t, r)
    refit(dense, t)
    for turn in range(shakes.shape[0]):
        for r in range(LANES):
            begin(dense, t, r)
            pull_of(dense, t, r)
            warm_round(dense, t, r, turn, sweeps, shakes[turn])
        refit(dense, t)
    to_stored(dense.grid, t)
    for r in range(min(LANES, codes_out.shape[0] - first)):
        settle(dense, t, r)
        scatter_row(t, r, params_io, codes_out, first + r)
        if gains.shape[0] > 0:
            gains[first + r] = gain_of(t, r)


@inlined
def warm_round(dense, t, r, turn, sweeps, share):
    """A round of descent of row r, its targets shifted by `share` of its error as the shakes of `turn` say; then the
    equations of its refit.
    """
    total = splat(np.float32(0))
    for b in range(BLOCKS):
        total = fma(load(t.y, r * BLOCKS + b) - load(t.row, b), load(t.pull, b), total)
    energy = tree(total) * (np.float32(1) / np.float32(GROUP))
    # Rounding may drive an energy below zero, and a large one overflows: neither shifts anything.
    if not (energy > 0 and energy < MOST_ENERGY):
        energy = np.float32(0)
    shift = share * np.sqrt(energy)
    sweep_row(t.row, t.pull, t.book, dense.columns, turn * SWEEPS, sweeps, shift)
    follow(dense, t, r)
    equations(dense, t, r)


@inlined
def settle(dense, t, r):
    """Plain descent of row r for the levels that are stored."""
    begin(dense, t, r)
    pull_of(dense, t, r)
    sweep_row(t.row, t.pull, t.book, dense.columns, 0, SWEEPS, np.float32(0))


@inlined
def gain_of(t, r):
    """yᵀHy / (yᵀHy - yᵀHe) of row r, whose errors e are those of t.row.

    Where that is beyond 2, or not positive, the levels carry too little of the row to be scaled, and the gain is 1.
    """
    whole, lost = splat(np.float32(0)), splat(np.float32(0))
    for b in range(BLOCKS):
        y, ys = load(t.y, r * BLOCKS + b), load(t.ys, r * BLOCKS + b)
        whole = fma(ys, y, whole)
        lost = fma(ys, y - load(t.row, b), lost)
    energy = tree(whole)
    kept = energy - tree(lost)
    return energy / kept if energy > 0 and kept > SIGNAL_FLOOR * energy else np.float32(1)
