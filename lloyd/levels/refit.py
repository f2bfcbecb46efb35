"""Moving levels under a group's Hessian, codes fixed: the normal equations AᵀHA c = AᵀHy, on lanes.

A [256, K] holds one indicator column for each level, or the columns (1, code) for an evenly spaced grid. With H = R
diag(h) Rᵀ the equations need the transforms of A's columns; with a dense H they need its products with them, which
dense/sums.py keeps.
"""

from __future__ import annotations

import numpy as np

from ..constants import GROUP, PIVOT_FLOOR, POSED_FLOOR, RIDGE
from ..loops import compiled, inlined
from ..simd.lanes import PANEL, product
from ..simd.vec import fma, load, root, splat, store, where_eq, where_gt


@compiled
def indicator(codes, k, signs, out):
    """out [256, 16] = signs where codes is k, else 0."""
    wanted = splat(np.float32(k))
    zero = splat(np.float32(0))
    for i in range(GROUP):
        store(out, i, where_eq(load(codes, i), wanted, splat(signs[i]), zero))


@compiled
def signed(block, signs, out):
    """out = block with row i multiplied by signs[i]."""
    for i in range(GROUP):
        store(out, i, load(block, i) * splat(signs[i]))


@inlined
def multiply(matrix, block, out):
    """out [256, 16] = -matrix · block."""
    out[:] = 0.0
    for i in range(0, GROUP, PANEL):
        product(out, i, matrix, i, block, GROUP)


@compiled
def weighted_dot(weights, a, b):
    """Σ_i weights[i] · a[i] · b[i] in each lane, four partial sums in a fixed order."""
    s0 = splat(np.float32(0))
    s1 = splat(np.float32(0))
    s2 = splat(np.float32(0))
    s3 = splat(np.float32(0))
    for i in range(0, GROUP, 4):
        s0 = fma(splat(weights[i]) * load(a, i), load(b, i), s0)
        s1 = fma(splat(weights[i + 1]) * load(a, i + 1), load(b, i + 1), s1)
        s2 = fma(splat(weights[i + 2]) * load(a, i + 2), load(b, i + 2), s2)
        s3 = fma(splat(weights[i + 3]) * load(a, i + 3), load(b, i + 3), s3)
    return (s0 + s1) + (s2 + s3)


@compiled
def normal_equations(ys, basis, weights, gram, rhs):
    """gram [K, K, 16] (lower part) and rhs [K, 16] of transformed columns [K, 256, 16] and target ys [256, 16]."""
    for k in range(basis.shape[0]):
        store(rhs, k, weighted_dot(weights, basis[k], ys))
        for m in range(k + 1):
            store(gram[k], m, weighted_dot(weights, basis[k], basis[m]))


@inlined
def solve(gram, rhs, levels):
    """Solve gram c = rhs in every lane for levels [K, 16], tied to the old ones by a small ridge; gram and rhs are
    overwritten.

    A lane in which rounding has driven a pivot to zero or below keeps its levels.
    """
    count = levels.shape[0]
    one = splat(np.float32(1))
    zero = splat(np.float32(0))
    trace = zero
    for k in range(count):
        trace = trace + load(gram[k], k)
    tie = trace * splat(RIDGE / np.float32(count))
    floor = tie * splat(PIVOT_FLOOR)
    good = one
    for k in range(count):
        store(gram[k], k, load(gram[k], k) + tie)
        store(rhs, k, fma(tie, load(levels, k), load(rhs, k)))
    for k in range(count):
        pivot = load(gram[k], k)
        for m in range(k):
            entry = load(gram[k], m)
            for n in range(m):
                entry = entry - load(gram[k], n) * load(gram[m], n)
            entry = entry / load(gram[m], m)
            store(gram[k], m, entry)
            pivot = pivot - entry * entry
        good = where_gt(pivot, floor, good, zero)
        store(gram[k], k, root(where_gt(pivot, floor, pivot, one)))
    for k in range(count):
        value = load(rhs, k)
        for m in range(k):
            value = value - load(gram[k], m) * load(rhs, m)
        store(rhs, k, value / load(gram[k], k))
    for back in range(count):
        k = count - 1 - back
        value = load(rhs, k)
        for m in range(k + 1, count):
            value = value - load(gram[m], k) * load(rhs, m)
        store(rhs, k, value / load(gram[k], k))
    for k in range(count):
        store(levels, k, where_gt(good, zero, load(rhs, k), load(levels, k)))


@inlined
def solve_grid(gram, rhs, levels, line):
    """Fit levels [K, 16] of an evenly spaced grid from gram [2, 2, 16] and rhs [2, 16] of the columns (1, code).

    line [2, 16] receives their zero and scale. A lane whose system is nearly singular, or whose scale would not be
    positive, keeps its levels.
    """
    g00 = load(gram[0], 0)
    g10 = load(gram[1], 0)
    g11 = load(gram[1], 1)
    b0 = load(rhs, 0)
    b1 = load(rhs, 1)
    nothing = splat(np.float32(0))
    determinant = g00 * g11 - g10 * g10
    good = where_gt(determinant, splat(POSED_FLOOR) * g00 * g11, splat(np.float32(1)), nothing)
    safe = where_gt(good, nothing, determinant, splat(np.float32(1)))
    zero = (b0 * g11 - b1 * g10) / safe
    scale = (b1 * g00 - b0 * g10) / safe
    good = where_gt(scale, nothing, good, nothing)
    store(line, 0, where_gt(good, nothing, zero, load(line, 0)))
    store(line, 1, where_gt(good, nothing, scale, load(line, 1)))
    for k in range(levels.shape[0]):
        store(levels, k, where_gt(good, nothing, zero + scale * splat(np.float32(k)), load(levels, k)))
