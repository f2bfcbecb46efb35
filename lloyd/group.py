"""Whole-matrix drivers over lanes: one group column of all rows, from rotated weights to codes and levels under H.

The order of work: initial levels are given; error feedback, refit under H, then rounds of coordinate descent and
refit; the caller rounds the levels to their stored precision, and `settle_rows` assigns the codes once more with
exactly those. Depends on lanes, rounding, refit, vec, numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .codes.descent import descend, heat
from .codes.feedback import feedback, residual
from .constants import GROUP, SHAKE, SIGNAL_FLOOR, SWEEPS
from .levels.refit import (
    dense_equations,
    indicator,
    multiply,
    normal_equations,
    signed,
    solve,
    solve_grid,
    weighted_dot,
)
from .simd.lanes import assign, gather, hadamard, lined_up, midpoints, scatter, sort_levels
from .simd.vec import LANES, load, splat, store


@njit(cache=True, nogil=True)
def refit_levels(ys, codes, matrix, total, weights, signs, grid, basis, sums, gram, rhs, levels):
    """Move levels [K, 16] to their best places for these codes.

    ys is H·y for a dense H, else the signed transform of y; `total`, for a grid under a dense H, is the sum of H.
    """
    if weights.shape[0] > 0:
        if grid:
            for i in range(GROUP):
                sign = splat(signs[i])
                store(basis[0], i, sign)
                store(basis[1], i, sign * load(codes, i))
            hadamard(basis[0])
            hadamard(basis[1])
        else:
            for k in range(levels.shape[0]):
                indicator(codes, k, signs, basis[k])
                hadamard(basis[k])
        normal_equations(ys, basis, weights, gram, rhs)
    elif grid:
        ones = np.ones(GROUP, np.float32)
        for i in range(GROUP):
            store(basis[0], i, splat(np.float32(1)))
        store(rhs, 0, weighted_dot(ones, ys, basis[0]))
        store(rhs, 1, weighted_dot(ones, ys, codes))
        multiply(matrix, codes, basis[1])
        store(gram[1], 1, splat(np.float32(-1)) * weighted_dot(ones, basis[1], codes))
        store(gram[1], 0, splat(np.float32(-1)) * weighted_dot(ones, basis[1], basis[0]))
        store(gram[0], 0, splat(total))
    else:
        dense_equations(ys, codes, matrix, sums, gram, rhs)
    if grid:
        solve_grid(gram, rhs, levels)
    else:
        solve(gram, rhs, levels)
        sort_levels(levels, codes)


@njit(cache=True, nogil=True)
def pulled(y, matrix, weights, signs, out):
    """out = H·y for a dense H, else the signed transform of y."""
    if weights.shape[0] > 0:
        signed(y, signs, out)
        hadamard(out)
    else:
        multiply(matrix, y, out)
        minus = splat(np.float32(-1))
        for i in range(GROUP):
            store(out, i, minus * load(out, i))


@njit(cache=True, nogil=True)
def gradient(errors, matrix, weights, signs, out):
    """out = H·errors [256, 16]."""
    pulled(errors, matrix, weights, signs, out)
    if weights.shape[0] > 0:
        for i in range(GROUP):
            store(out, i, load(out, i) * splat(weights[i] / np.float32(GROUP)))
        hadamard(out)
        signed(out, signs, out)


@njit(cache=True, nogil=True)
def fit_rows(rows, column, matrix, factor, weights, signs, shakes, grid, rounds, levels_io, codes_out):
    """Codes u8 [R, 256] and levels f32 [R, K] of the group that starts at `column` of rows f32 [R, K_in].

    levels_io holds the initial levels, ascending, and receives the fitted ones, not yet rounded; `weights` is the
    diagonal form of H, or empty for a dense one; `grid` keeps the levels evenly spaced. All of the `rounds` of descent
    and refit but the last are warm, shifted as `shakes` f32 [sweeps, 16, 16] says.
    """
    count = levels_io.shape[1]
    unknowns = 2 if grid else count
    matrix = lined_up(matrix)
    y = np.empty((GROUP, LANES), np.float32)
    ys = np.empty((GROUP, LANES), np.float32)
    work = np.empty((GROUP, LANES), np.float32)
    errors = np.empty((GROUP, LANES), np.float32)
    codes = np.zeros((GROUP, LANES), np.float32)
    levels = np.zeros((count, LANES), np.float32)
    mids = np.empty((count - 1, LANES), np.float32)
    basis = np.empty((unknowns, GROUP, LANES), np.float32)
    sums = np.empty((LANES, unknowns, GROUP), np.float32)
    gram = np.zeros((unknowns, unknowns, LANES), np.float32)
    rhs = np.empty((unknowns, LANES), np.float32)
    shifts = np.empty((1, LANES), np.float32)
    total = np.float32(0)
    if grid and weights.shape[0] == 0:
        for i in range(GROUP):
            for j in range(GROUP):
                total += matrix[i, j]
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, y)
        live = min(LANES, rows.shape[0] - first)
        for k in range(count):
            for r in range(live):
                levels[k, r] = levels_io[first + r, k]
        pulled(y, matrix, weights, signs, ys)
        midpoints(levels, mids)
        feedback(y, factor, levels, mids, codes, work, errors)
        refit_levels(ys, codes, matrix, total, weights, signs, grid, basis, sums, gram, rhs, levels)
        for n in range(rounds):
            residual(y, levels, codes, errors)
            gradient(errors, matrix, weights, signs, work)
            heat(errors, work, SHAKE if n + 1 < rounds else np.float32(0), shifts)
            descend(codes, work, levels, matrix, shakes, n * SWEEPS, SWEEPS, shifts)
            refit_levels(ys, codes, matrix, total, weights, signs, grid, basis, sums, gram, rhs, levels)
        for k in range(count):
            for r in range(live):
                levels_io[first + r, k] = levels[k, r]
        scatter(codes, codes_out, first)


@njit(cache=True, nogil=True)
def settle_rows(rows, column, matrix, weights, signs, shakes, stored, codes_io, gains):
    """Assign codes once more, given the stored levels f32 [R, K]; gains f32 [R] receives each row's (yᵀH y)/(yᵀH ŷ).

    A gain beyond 2, or not positive, means that the group carries no signal worth keeping: it becomes 1.
    """
    count = stored.shape[1]
    y = np.empty((GROUP, LANES), np.float32)
    ys = np.empty((GROUP, LANES), np.float32)
    errors = np.empty((GROUP, LANES), np.float32)
    codes = np.zeros((GROUP, LANES), np.float32)
    levels = np.zeros((count, LANES), np.float32)
    pull = np.empty((GROUP, LANES), np.float32)
    totals = np.empty((2, LANES), np.float32)
    cold = np.zeros((1, LANES), np.float32)
    ones = np.ones(GROUP, np.float32)
    for first in range(0, rows.shape[0], LANES):
        live = min(LANES, rows.shape[0] - first)
        gather(rows, first, column, y)
        gather(codes_io, first, 0, codes)
        for r in range(live):
            for k in range(count):
                levels[k, r] = stored[first + r, k]
        residual(y, levels, codes, errors)
        gradient(errors, matrix, weights, signs, pull)
        descend(codes, pull, levels, matrix, shakes, 0, SWEEPS, cold)
        scatter(codes, codes_io, first)
        residual(y, levels, codes, errors)
        pulled(y, matrix, weights, signs, ys)
        if weights.shape[0] > 0:
            signed(errors, signs, errors)
            hadamard(errors)
            store(totals, 0, weighted_dot(weights, ys, ys))
            store(totals, 1, weighted_dot(weights, ys, errors))
        else:
            store(totals, 0, weighted_dot(ones, ys, y))
            store(totals, 1, weighted_dot(ones, ys, errors))
        for r in range(live):
            whole = totals[0, r]
            kept = whole - totals[1, r]
            gains[first + r] = whole / kept if kept > SIGNAL_FLOOR * whole else np.float32(1)


@njit(cache=True, nogil=True)
def nearest_rows(rows, column, stored, codes_out):
    """Codes u8 [R, 256] of the nearest of the stored levels f32 [R, K], ascending; a tie takes the lower code."""
    count = stored.shape[1]
    y = np.empty((GROUP, LANES), np.float32)
    codes = np.empty((GROUP, LANES), np.float32)
    levels = np.zeros((count, LANES), np.float32)
    mids = np.empty((count - 1, LANES), np.float32)
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, y)
        for r in range(min(LANES, rows.shape[0] - first)):
            for k in range(count):
                levels[k, r] = stored[first + r, k]
        midpoints(levels, mids)
        for i in range(GROUP):
            assign(load(y, i), levels, mids, codes, i)
        scatter(codes, codes_out, first)
