"""Choosing codes under a group's Hessian by error feedback, on lanes.

The 256 columns are walked in panels of 8: what the columns before a panel move in it comes as one matrix product, the
rest column by column. Levels are given; refit.py moves them, descent.py improves the codes. Depends on lanes, vec and
numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..constants import GROUP
from ..simd.lanes import assign
from ..simd.vec import fma, load, splat, store, where_eq

PANEL = 8


@njit(cache=True, nogil=True)
def product(out, at, factors, row, errors, count):
    """out[at + n] -= Σ_b factors[row + n, b] · errors[b] for b < count, ascending, and n in 0..7, in 16 lanes.

    Eight sums at a time stay in registers, and each loaded row of errors serves all of them.
    """
    s0 = load(out, at)
    s1 = load(out, at + 1)
    s2 = load(out, at + 2)
    s3 = load(out, at + 3)
    s4 = load(out, at + 4)
    s5 = load(out, at + 5)
    s6 = load(out, at + 6)
    s7 = load(out, at + 7)
    for b in range(count):
        e = load(errors, b)
        s0 = fma(splat(-factors[row, b]), e, s0)
        s1 = fma(splat(-factors[row + 1, b]), e, s1)
        s2 = fma(splat(-factors[row + 2, b]), e, s2)
        s3 = fma(splat(-factors[row + 3, b]), e, s3)
        s4 = fma(splat(-factors[row + 4, b]), e, s4)
        s5 = fma(splat(-factors[row + 5, b]), e, s5)
        s6 = fma(splat(-factors[row + 6, b]), e, s6)
        s7 = fma(splat(-factors[row + 7, b]), e, s7)
    store(out, at, s0)
    store(out, at + 1, s1)
    store(out, at + 2, s2)
    store(out, at + 3, s3)
    store(out, at + 4, s4)
    store(out, at + 5, s5)
    store(out, at + 6, s6)
    store(out, at + 7, s7)


@njit(cache=True, nogil=True)
def feedback(y, factor, levels, mids, codes, work, errors):
    """Round y [256, 16] to levels [K, 16], each column's error moving the targets of the later ones.

    Writes codes [256, 16]; `work` and `errors` f32 [256, 16] are scratch.
    """
    work[:] = y
    for first in range(0, GROUP, PANEL):
        product(work, first, factor, first, errors, first)
        for j in range(first, first + PANEL):
            target = load(work, j)
            error = target - assign(target, levels, mids, codes, j)
            store(errors, j, error)
            for i in range(j + 1, first + PANEL):
                store(work, i, fma(splat(-factor[i, j]), error, load(work, i)))


@njit(cache=True, nogil=True)
def residual(y, levels, codes, errors):
    """errors [256, 16] = y - levels[codes]."""
    for i in range(GROUP):
        code = load(codes, i)
        value = load(levels, 0)
        for k in range(1, levels.shape[0]):
            value = where_eq(code, splat(np.float32(k)), load(levels, k), value)
        store(errors, i, load(y, i) - value)
