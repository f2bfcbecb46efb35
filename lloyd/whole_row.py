"""Whole rows under a second moment: group by group, then again with all groups rounded."""

from __future__ import annotations

import numpy as np

from .again import error_tiles, fit_again
from .constants import GROUP
from .group_fit import F32, GroupFit, Rotated, expand, fit_group
from .hessian.row import RowHessian
from .loops import compiled
from .simd.lanes import PANEL, block_of, gather, lined_up_room, product, scatter_at
from .simd.vec import LANES


def fit_whole_rows(rows: F32, fmt: Rotated, hessian: RowHessian) -> list[GroupFit]:
    """Every group of rows f32 [R, K] in turn, each answers the errors of earlier ones; and then all those of all."""
    tiles, groups = -(-len(rows) // LANES), len(hessian.groups)
    errors = lined_up_room(groups, tiles, GROUP, LANES)
    fits, targets, coupled = [], np.empty((len(rows), GROUP), np.float32), hessian.coupling is not None
    for g, (factored, answer) in enumerate(zip(hessian.groups, hessian.answers, strict=True)):
        answer_errors(rows, g * GROUP, errors, answer, targets)
        fit = fit_group(targets, 0, fmt, factored, hessian.shakes, coupled)
        error_tiles(rows, g * GROUP, expand(fmt, fit.stored), fit.codes, errors[g])
        fits.append(fit)
    return fits if hessian.coupling is None else fit_again(rows, fmt, hessian.coupling, fits, errors)


@compiled
def answer_errors(rows, column, errors, answer, targets):
    """targets f32 [R, 256]: the group of rows f32 [R, K] at `column`, moved by the errors of earlier groups.

    errors f32 [G, tiles, 256, 16]; answer f32 [g, 256, 256] has a matrix for each of the first groups.
    """
    y = block_of(GROUP)
    for first in range(0, rows.shape[0], LANES):
        gather(rows, first, column, y)
        for other in range(answer.shape[0]):
            for i in range(0, GROUP, PANEL):
                product(y, i, answer[other], i, errors[other, first // LANES], GROUP)
        scatter_at(y, targets, first, 0)
