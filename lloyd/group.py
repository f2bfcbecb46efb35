"""One group of all rows of a matrix, sixteen rows at a time: from rotated weights to codes and levels under H.

The caller gives initial levels. `fit_rows` rounds with error feedback, refits the levels under H, and repeats rounds of
descent and refit. The caller rounds the levels to the precision in which the file stores them, and `settle_rows`
assigns the codes once more with exactly those. numba takes the named tuples apart when it compiles, so they cost
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codes.descent import descend, heat
from .codes.feedback import feedback, residual
from .constants import GROUP, SIGNAL_FLOOR, SWEEPS
from .levels.refit import (
    indicator,
    normal_equations,
    signed,
    solve,
    solve_grid,
    weighted_dot,
)
from .loops import compiled
from .simd.lanes import assign, gather, hadamard, lined_up, midpoints, scatter, sort_levels
from .simd.vec import LANES, load, splat, store

F32 = NDArray[np.float32]


class Problem(NamedTuple):
    """What all rows of one group have in common.

    `matrix` f32 [256, 256] is H in the stored basis, `feedback` f32 [256, 256] its factor, `weights` f32 [256] the
    diagonal that H came from. `signs` f32 [256] are those of the rotation, `shakes` f32 [sweeps,
    16, 16] say which way warm sweeps shift targets. `grid` keeps levels evenly spaced.
    """

    matrix: F32
    feedback: F32
    weights: F32
    signs: F32
    shakes: F32
    grid: bool


class Scratch(NamedTuple):
    """Blocks of sixteen rows, a lane each, that one call takes once: f32 [256, 16] where nothing else is said.

    y are the rows, ys the signed transform of y; `errors` y minus its decoded values; `codes` whole numbers; levels
    [K, 16] and their midpoints mids [K-1, 16]; line [2, 16] zero and scale of a grid; `work` what a stage needs; shifts
    [1, 16] the heat of each row. With n unknowns, K or 2 for a grid, basis [n, 256, 16], gram [n, n, 16], rhs [n, 16].
    """

    y: F32
    ys: F32
    errors: F32
    codes: F32
    levels: F32
    mids: F32
    line: F32
    work: F32
    basis: F32
    gram: F32
    rhs: F32
    shifts: F32


@compiled
def scratch_for(count, grid):
    """Scratch for `count` levels, or for a grid of so many."""
    unknowns = 2 if grid else count
    return Scratch(
        np.empty((GROUP, LANES), np.float32),
        np.empty((GROUP, LANES), np.float32),
        np.empty((GROUP, LANES), np.float32),
        np.zeros((GROUP, LANES), np.float32),
        np.zeros((count, LANES), np.float32),
        np.empty((count - 1, LANES), np.float32),
        np.zeros((2, LANES), np.float32),
        np.empty((GROUP, LANES), np.float32),
        np.empty((unknowns, GROUP, LANES), np.float32),
        np.zeros((unknowns, unknowns, LANES), np.float32),
        np.empty((unknowns, LANES), np.float32),
        np.empty((1, LANES), np.float32),
    )


@compiled
def refit_levels(problem, s):
    """Move the levels of scratch `s` to their best places for its codes."""
    weights, signs = problem.weights, problem.signs
    if problem.grid:
        for i in range(GROUP):
            sign = splat(signs[i])
            store(s.basis[0], i, sign)
            store(s.basis[1], i, sign * load(s.codes, i))
        hadamard(s.basis[0])
        hadamard(s.basis[1])
    else:
        for k in range(s.levels.shape[0]):
            indicator(s.codes, k, signs, s.basis[k])
            hadamard(s.basis[k])
    normal_equations(s.ys, s.basis, weights, s.gram, s.rhs)
    if problem.grid:
        solve_grid(s.gram, s.rhs, s.levels, s.line)
    else:
        solve(s.gram, s.rhs, s.levels)
        sort_levels(s.levels, s.codes)


@compiled
def turned(problem, y, out):
    """out = the signed transform of y [256, 16]."""
    signed(y, problem.signs, out)
    hadamard(out)


@compiled
def gradient(problem, errors, out):
    """out = H·errors [256, 16]."""
    turned(problem, errors, out)
    for i in range(GROUP):
        store(out, i, load(out, i) * splat(problem.weights[i] / np.float32(GROUP)))
    hadamard(out)
    signed(out, problem.signs, out)


@compiled
def fit_rows(rows, column, problem, shakes, levels_io, codes_out):
    """Codes u8 [R, 256] and levels f32 [R, K] of the group that starts at `column` of rows f32 [R, K_in].

    levels_io holds the initial levels, ascending, and receives the fitted ones, not yet rounded. There is a
    round of descent and refit for each of shakes f32 [n]; it is warm where that is not 0.
    """
    problem = Problem(lined_up(problem.matrix), *problem[1:])
    s = scratch_for(levels_io.shape[1], problem.grid)
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, s.y)
        gather_levels(levels_io, first, s.levels)
        turned(problem, s.y, s.ys)
        midpoints(s.levels, s.mids)
        feedback(s.y, problem.feedback, s.levels, s.mids, s.codes, s.work, s.errors)
        refit_levels(problem, s)
        for n in range(shakes.shape[0]):
            improve(problem, n, shakes[n], s)
        scatter_levels(s.levels, levels_io, first)
        scatter(s.codes, codes_out, first)


@compiled
def improve(problem, turn, share, s):
    """One round of descent, its targets shifted by `share` of the error as the shakes of `turn` say, and a refit."""
    residual(s.y, s.levels, s.codes, s.errors)
    gradient(problem, s.errors, s.work)
    heat(s.errors, s.work, share, s.shifts)
    descend(s.codes, s.work, s.levels, problem.matrix, problem.shakes, turn * SWEEPS, SWEEPS, s.shifts)
    refit_levels(problem, s)


@compiled
def gather_levels(stored, first, levels):
    """Copy stored[first:first+16] f32 [R, K] into levels [K, 16], leaving out lanes beyond the last row."""
    for r in range(min(LANES, stored.shape[0] - first)):
        for k in range(stored.shape[1]):
            levels[k, r] = stored[first + r, k]


@compiled
def scatter_levels(levels, out, first):
    """Copy levels [K, 16] into out[first:first+16] f32 [R, K], leaving out lanes beyond the last row."""
    for r in range(min(LANES, out.shape[0] - first)):
        for k in range(out.shape[1]):
            out[first + r, k] = levels[k, r]


@compiled
def settle(problem, s):
    """Descend without shifts until nothing moves, or for SWEEPS sweeps; leaves the errors in `s`."""
    s.shifts[:] = np.float32(0)
    residual(s.y, s.levels, s.codes, s.errors)
    gradient(problem, s.errors, s.work)
    descend(s.codes, s.work, s.levels, problem.matrix, problem.shakes, 0, SWEEPS, s.shifts)
    residual(s.y, s.levels, s.codes, s.errors)


@compiled
def write_gains(whole, lost, first, gains):
    """gains[first:first+16] f32 [R] = yᵀHy / (yᵀHy - yᵀHe) of lanes' yᵀHy and yᵀHe, both [1, 16].

    Where that is beyond 2, or not positive, the levels carry too little of the row to be scaled, and the gain is 1.
    """
    for r in range(min(LANES, gains.shape[0] - first)):
        kept = whole[0, r] - lost[0, r]
        gains[first + r] = whole[0, r] / kept if kept > SIGNAL_FLOOR * whole[0, r] else np.float32(1)


@compiled
def settle_rows(rows, column, problem, stored, codes_io, gains):
    """Assign codes u8 [R, 256] once more, given the stored levels f32 [R, K].

    gains f32 [R] receives each row's (yᵀH y)/(yᵀH ŷ), as write_gains has it.
    """
    weights = problem.weights
    s = scratch_for(stored.shape[1], problem.grid)
    whole = np.empty((1, LANES), np.float32)
    lost = np.empty((1, LANES), np.float32)
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, s.y)
        gather(codes_io, first, 0, s.codes)
        gather_levels(stored, first, s.levels)
        settle(problem, s)
        scatter(s.codes, codes_io, first)
        turned(problem, s.y, s.ys)
        turned(problem, s.errors, s.work)
        store(whole, 0, weighted_dot(weights, s.ys, s.ys))
        store(lost, 0, weighted_dot(weights, s.ys, s.work))
        write_gains(whole, lost, first, gains)


@compiled
def nearest_rows(rows, column, stored, codes_out):
    """Codes u8 [R, 256] of the nearest of the stored levels f32 [R, K], ascending; a tie takes the lower code."""
    count = stored.shape[1]
    y = np.empty((GROUP, LANES), np.float32)
    codes = np.empty((GROUP, LANES), np.float32)
    levels = np.zeros((count, LANES), np.float32)
    mids = np.empty((count - 1, LANES), np.float32)
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, y)
        gather_levels(stored, first, levels)
        midpoints(levels, mids)
        for i in range(GROUP):
            assign(load(y, i), levels, mids, codes, i)
        scatter(codes, codes_out, first)
