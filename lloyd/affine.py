"""Evenly spaced levels for a group (MQ4, MQ6): a search over both ends of the range, then least squares, on lanes.

Plain squared error; rounding under a Hessian starts from here. Depends on lanes, vec and numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .lanes import GROUP, gather
from .vec import LANES, fma, load, splat, store, where_gt

_MAGIC = np.float32(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds to the nearest whole number, ties to even."""
_SMALLEST = np.float32(2.0**-124)
"""Scales beyond this have a finite reciprocal; a group too narrow for one counts as constant."""
SHRINK = np.array([0.0, 0.03, 0.07, 0.11, 0.16, 0.22, 0.3], np.float32)
"""Shares of the range that the search cuts off at either end."""


@njit(cache=True, nogil=True)
def grid_code(value, zero, inverse, top):
    """The whole number in 0..top nearest to (value - zero) · inverse."""
    magic = splat(_MAGIC)
    q = (value - zero) * inverse
    q = where_gt(q, splat(np.float32(0)), q, splat(np.float32(0)))
    q = where_gt(q, top, top, q)
    return (q + magic) - magic


@njit(cache=True, nogil=True)
def grid_error(y, zero, scale, inverse, top):
    """Σ (y - zero - scale·q)² codes to nearest."""
    error = splat(np.float32(0))
    minus = splat(np.float32(0)) - scale
    for i in range(GROUP):
        v = load(y, i)
        d = fma(minus, grid_code(v, zero, inverse, top), v - zero)
        error = fma(d, d, error)
    return error


@njit(cache=True, nogil=True)
def refine(y, zero, scale, top, out):
    """One least-squares step: out[0], out[1] = the zero and scale that fit best the codes nearest under given ones."""
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
    usable = where_gt(determinant, splat(np.float32(0.5)), one, none)
    safe = where_gt(usable, none, determinant, one)
    new_scale = (n * syq - sq * sy) / safe
    new_zero = zero + (sy * sqq - sq * syq) / safe
    usable = where_gt(new_scale, splat(_SMALLEST), usable, none)
    store(out, 0, where_gt(usable, none, new_zero, zero))
    store(out, 1, where_gt(usable, none, new_scale, scale))


@njit(cache=True, nogil=True)
def affine_rows(rows, column, count, shrink, steps, params):
    """(zero, scale) f32 [R, 2] of `count` even levels for the group at `column` of each row of rows f32 [R, K_in].

    `steps` least-squares steps follow the search. A constant group takes scale 1.
    """
    y = np.empty((GROUP, LANES), np.float32)
    out = np.empty((2, LANES), np.float32)
    none = splat(np.float32(0))
    one = splat(np.float32(1))
    top = splat(np.float32(count - 1))
    spacing = splat(np.float32(1) / np.float32(count - 1))
    smallest = splat(_SMALLEST)
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, y)
        low = load(y, 0)
        high = low
        for i in range(1, GROUP):
            v = load(y, i)
            low = where_gt(low, v, v, low)
            high = where_gt(v, high, v, high)
        width = high - low
        flat = where_gt(width * spacing, smallest, none, one)
        zero = low
        scale = where_gt(flat, none, one, width * spacing)
        best = grid_error(y, zero, scale, one / scale, top)
        for a in range(shrink.shape[0]):
            for b in range(shrink.shape[0]):
                if a + b == 0:
                    continue
                tried_zero = fma(splat(shrink[a]), width, low)
                tried = where_gt(
                    flat, none, one, width * spacing * splat(np.float32(1) - shrink[a] - shrink[b])
                )
                error = grid_error(y, tried_zero, tried, one / tried, top)
                zero = where_gt(best, error, tried_zero, zero)
                scale = where_gt(best, error, tried, scale)
                best = where_gt(best, error, error, best)
        zero = where_gt(flat, none, low, zero)
        store(out, 0, zero)
        store(out, 1, scale)
        for _ in range(steps):
            refine(y, load(out, 0), load(out, 1), top, out)
        for r in range(min(LANES, rows.shape[0] - first)):
            params[first + r, 0] = out[0, r]
            params[first + r, 1] = out[1, r]
