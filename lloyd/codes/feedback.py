"""Choosing codes under a group's Hessian by error feedback, on lanes.

The 256 columns are taken in panels of 8. The errors of all columns before a panel move its targets in one matrix
product; inside the panel they do so column by column. Levels are given: levels/refit.py moves them, and descent.py
improves the codes afterwards.
"""

from __future__ import annotations

import numpy as np

from ..constants import GROUP
from ..loops import compiled
from ..simd.lanes import PANEL, assign, copy, product
from ..simd.vec import fma, load, splat, store, where_eq


@compiled
def feedback(y, factor, levels, mids, codes, work, errors):
    """Round y [256, 16] to levels [K, 16], each column's error moving the targets of the later ones.

    Writes codes [256, 16]; `work` and `errors` f32 [256, 16] are scratch.
    """
    copy(y, 0, GROUP, work, 0)
    for first in range(0, GROUP, PANEL):
        product(work, first, factor, first, errors, first)
        for j in range(first, first + PANEL):
            target = load(work, j)
            error = target - assign(target, levels, mids, codes, j)
            store(errors, j, error)
            for i in range(j + 1, first + PANEL):
                store(work, i, fma(splat(-factor[i, j]), error, load(work, i)))


@compiled
def residual(y, levels, codes, errors):
    """errors [256, 16] = y - levels[codes]."""
    for i in range(GROUP):
        code = load(codes, i)
        value = load(levels, 0)
        for k in range(1, levels.shape[0]):
            value = where_eq(code, splat(np.float32(k)), load(levels, k), value)
        store(errors, i, load(y, i) - value)
