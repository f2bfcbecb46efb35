"""Whole rows under a second moment: group by group, then again with all groups rounded."""

from __future__ import annotations

import numpy as np

from .again import fit_again
from .constants import GROUP
from .group_fit import F32, GroupFit, Rotated, expand, fit_group
from .hessian.row import RowHessian, compensate


def fit_whole_rows(rows: F32, fmt: Rotated, hessian: RowHessian) -> list[GroupFit]:
    """Every group of rows f32 [R, K] in turn; later groups answer the errors of earlier ones, and then all of all."""
    answered, fits = rows.copy(), []
    for g, factored in enumerate(hessian.groups):
        fit = fit_group(answered, g * GROUP, fmt, factored, hessian.shakes)
        decoded = np.take_along_axis(expand(fmt, fit.stored), fit.codes.astype(np.int64), axis=1)
        compensate(answered, g, answered[:, g * GROUP : (g + 1) * GROUP] - decoded, hessian.answers)
        fits.append(fit)
    return fits if hessian.coupling is None else fit_again(rows, fmt, hessian.coupling, fits)
