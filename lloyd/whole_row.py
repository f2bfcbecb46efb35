"""Whole rows under a second moment: group by group, then again with all groups rounded."""

from __future__ import annotations

import numpy as np

from .again import fit_again
from .constants import GROUP
from .group_fit import F32, GroupFit, Rotated, expand, fit_group
from .hessian.row import RowHessian, compensate
from .loops import compiled


def fit_whole_rows(rows: F32, fmt: Rotated, hessian: RowHessian) -> list[GroupFit]:
    """Every group of rows f32 [R, K] in turn; later groups answer the errors of earlier ones, and then all of all."""
    answered, fits, errors = rows.copy(), [], np.empty((len(rows), GROUP), np.float32)
    for g, factored in enumerate(hessian.groups):
        fit = fit_group(answered, g * GROUP, fmt, factored, hessian.shakes, final=hessian.coupling is None)
        group_errors(answered, g * GROUP, expand(fmt, fit.stored), fit.codes, errors)
        compensate(answered, g, errors, hessian.answers)
        fits.append(fit)
    return fits if hessian.coupling is None else fit_again(rows, fmt, hessian.coupling, fits)


@compiled
def group_errors(rows, column, levels, codes, errors):
    """errors f32 [R, 256]: the group of rows f32 [R, K_in] at `column` minus levels f32 [R, K] by codes u8 [R, 256]."""
    for r in range(rows.shape[0]):
        for i in range(GROUP):
            errors[r, i] = rows[r, column + i] - levels[r, codes[r, i]]
