"""Evenly spaced levels of a group (MQ4, MQ6): a search over both ends of the range, then least squares; their codes.

The error is the plain squared one; the fit under a Hessian begins with these levels.
"""

from __future__ import annotations

import numpy as np

from ..constants import (
    BOTH_ENDS,
    COARSE_SCALE,
    DETERMINANT_FLOOR,
    GROUP,
    ONE_END,
    ROUNDER,
    SMALLEST_SCALE,
)
from ..loops import compiled
from ..simd.lanes import assign, gather, midpoints, scatter
from ..simd.vec import LANES, fma, load, splat, store, where_gt


@compiled
def grid_code(value, zero, inverse, top):
    """The whole number in 0..top nearest to (value - zero) · inverse."""
    magic = splat(ROUNDER)
    q = (value - zero) * inverse
    q = where_gt(q, splat(np.float32(0)), q, splat(np.float32(0)))
    q = where_gt(q, top, top, q)
    return (q + magic) - magic


@compiled
def grid_error(y, zero, scale, inverse, top):
    """Σ (y - zero - scale·q)² over the group [256, 16], with the nearest codes q."""
    error = splat(np.float32(0))
    minus = splat(np.float32(0)) - scale
    for i in range(GROUP):
        v = load(y, i)
        d = fma(minus, grid_code(v, zero, inverse, top), v - zero)
        error = fma(d, d, error)
    return error


@compiled
def refine(y, zero, scale, top, out):
    """One least-squares step: out [2, 16] receives the zero and scale that fit best the codes of the given ones."""
    none = splat(np.float32(0))
    one = splat(np.float32(1))
    inverse = one / scale
    sq, sqq, sy, syq = none, none, none, none
    for i in range(GROUP):
        v = load(y, i) - zero
        q = grid_code(load(y, i), zero, inverse, top)
        sq = sq + q
        sqq = fma(q, q, sqq)
        sy = sy + v
        syq = fma(v, q, syq)
    n = splat(np.float32(GROUP))
    determinant = n * sqq - sq * sq
    usable = where_gt(determinant, splat(DETERMINANT_FLOOR), one, none)
    safe = where_gt(usable, none, determinant, one)
    new_scale = (n * syq - sq * sy) / safe
    new_zero = zero + (sy * sqq - sq * syq) / safe
    usable = where_gt(new_scale, splat(SMALLEST_SCALE), usable, none)
    store(out, 0, where_gt(usable, none, new_zero, zero))
    store(out, 1, where_gt(usable, none, new_scale, scale))


@compiled
def attempt(y, low, width, step, a, b, top, best):
    """Try the grid without the shares a and b of the range; best [3, 16] is the least error so far, its a and b."""
    one = splat(np.float32(1))
    scale = step * (one - a - b)
    error = grid_error(y, fma(a, width, low), scale, one / scale, top)
    least = load(best, 0)
    store(best, 0, where_gt(least, error, error, least))
    store(best, 1, where_gt(least, error, a, load(best, 1)))
    store(best, 2, where_gt(least, error, b, load(best, 2)))


@compiled
def search(y, low, width, step, top, best):
    """Leave in best [3, 16] the error and the cut-off shares of the best grid: both ends together, then one by one."""
    best[0] = np.inf
    best[1:] = 0.0
    none = splat(np.float32(0))
    attempt(y, low, width, step, none, none, top, best)
    for share in BOTH_ENDS:
        attempt(y, low, width, step, splat(share), splat(share), top, best)
    for share in ONE_END:
        by = splat(share)
        a, b = load(best, 1), load(best, 2)
        attempt(y, low, width, step, a - by, b, top, best)
        attempt(y, low, width, step, a + by, b, top, best)
        a = load(best, 1)
        attempt(y, low, width, step, a, b - by, top, best)
        attempt(y, low, width, step, a, b + by, top, best)


@compiled
def best_grid(y, count, steps, best, out):
    """(zero, scale) of `count` even levels for lanes y [256, 16] into out [2, 16], after `steps` least-squares steps.

    best [3, 16] is scratch. A constant lane takes scale 1.
    """
    none = splat(np.float32(0))
    one = splat(np.float32(1))
    top = splat(np.float32(count - 1))
    low = load(y, 0)
    high = low
    for i in range(1, GROUP):
        v = load(y, i)
        low = where_gt(low, v, v, low)
        high = where_gt(v, high, v, high)
    width = high - low
    step = width * splat(np.float32(1) / np.float32(count - 1))
    flat = where_gt(step, splat(SMALLEST_SCALE), none, one)
    step = where_gt(flat, none, one, step)
    search(y, low, width, step, top, best)
    a, b = load(best, 1), load(best, 2)
    store(out, 0, where_gt(flat, none, low, fma(a, width, low)))
    store(out, 1, where_gt(flat, none, one, step * (one - a - b)))
    for _ in range(steps):
        refine(y, load(out, 0), load(out, 1), top, out)


@compiled
def nearest_grid(y, grid, live, levels, mids, codes):
    """Codes [256, 16] of the nearest of the levels zero + scale · k, given (zero, scale) in grid [2, 16].

    Of two that are as near the lower code wins. levels [K, 16] and mids [K-1, 16] are scratch; lanes from `live` on
    hold no row. A guess by division is at most one code off where the rounding of levels is small beside the scale;
    where it is not, values are compared with every midpoint.
    """
    none = splat(np.float32(0))
    one = splat(np.float32(1))
    half = splat(np.float32(0.5))
    count = levels.shape[0]
    top = splat(np.float32(count - 1))
    coarse = False
    for r in range(live):
        reach = abs(grid[0, r]) + grid[1, r] * np.float32(count)
        coarse = coarse or not grid[1, r] > reach * COARSE_SCALE
    zero, scale = load(grid, 0), load(grid, 1)
    if coarse:
        for k in range(count):
            store(levels, k, zero + scale * splat(np.float32(k)))
        midpoints(levels, mids)
        for i in range(GROUP):
            assign(load(y, i), levels, mids, codes, i)
        return
    inverse = one / scale
    for i in range(GROUP):
        v = load(y, i)
        q = grid_code(v, zero, inverse, top)
        here = zero + scale * q
        above = half * (here + (zero + scale * (q + one)))
        below = half * (here + (zero + scale * (q - one)))
        up = where_gt(v, above, where_gt(top, q, one, none), none)
        down = where_gt(v, below, none, where_gt(q, none, one, none))
        store(codes, i, q + up - down)


@compiled
def affine_rows(rows, column, count, steps, params, codes_out):
    """(zero, scale) f32 [R, 2] of `count` even levels for the group at `column` of each row of rows f32 [R, K_in], and
    the nearest codes u8 [R, 256] where codes_out has any rows.

    `steps` least-squares steps follow the search. A constant group takes scale 1.
    """
    y = np.empty((GROUP, LANES), np.float32)
    best = np.empty((3, LANES), np.float32)
    grid = np.empty((2, LANES), np.float32)
    codes = np.empty((GROUP, LANES), np.float32)
    levels = np.empty((count, LANES), np.float32)
    mids = np.empty((count - 1, LANES), np.float32)
    for first in range(0, rows.shape[0], LANES):
        live = min(LANES, rows.shape[0] - first)
        gather(rows, first, column, y)
        best_grid(y, count, steps, best, grid)
        for r in range(live):
            params[first + r, 0] = grid[0, r]
            params[first + r, 1] = grid[1, r]
        if codes_out.shape[0] > 0:
            nearest_grid(y, grid, live, levels, mids, codes)
            scatter(codes, codes_out, first)
