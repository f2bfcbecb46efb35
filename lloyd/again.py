"""Whole rows again: each group is fitted to the target that answers the errors of all other groups of its row.

The first pass over a row fits a group while the later ones are still exact, and expects of them what no rounded group
can do. Here every group has been rounded. With errors e = y - ŷ, the best that group g can do is ŷ_g near t_g = y_g +
H_gg⁻¹ · Σ_{r≠g} H_gr e_r, under H_gg. It starts from the levels and codes that stand: a warm round of descent and
refit, rounding to the format's precision, and plain descent. What a row gets by it is kept where it costs less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..formats.blocks import AffineFormat
from ..formats.fwht import SIGNS2
from .codes.feedback import residual
from .constants import GROUP, PASSES, SHAKE, WHOLE
from .group import (
    Problem,
    gather_levels,
    improve,
    pulled,
    scatter_levels,
    scratch_for,
    settle,
    total_of,
    write_gains,
)
from .group_fit import F32, SIGNS, GroupFit, Rotated, as_stored, even_levels, expand
from .hessian.row import Coupling
from .levels.refit import multiply, weighted_dot
from .loops import compiled
from .simd.lanes import PANEL, gather, lined_up, product, scatter
from .simd.vec import LANES, load, store, where_gt


def fit_again(rows: F32, fmt: Rotated, coupling: Coupling, fits: Sequence[GroupFit]) -> list[GroupFit]:
    """The groups of rows f32 [R, K] after PASSES passes that begin with `fits`, the groups in their order.

    The cost eᵀHe of no row rises, but for the rounding of f32. Gains are those of the last pass: the target's energy
    over what the levels have of it.
    """
    count, found = len(rows), list(fits)
    tiles = -(-count // LANES)
    errors = np.empty((len(found), tiles, GROUP, LANES), np.float32)
    targets, turned = (np.empty((tiles, GROUP, LANES), np.float32) for _ in range(2))
    for g, fit in enumerate(found):
        error_tiles(rows, g * GROUP, expand(fmt, fit.stored), fit.codes, errors[g])
    for turn in range(len(WHOLE) - 1, len(WHOLE) - 1 - PASSES, -1):
        for g, old in enumerate(found):
            matrix = coupling.blocks[g]
            problem = Problem(matrix, matrix, _DENSE, SIGNS2, SIGNS, isinstance(fmt, AffineFormat))
            before = expand(fmt, old.stored)
            levels, codes = before.copy(), old.codes.copy()
            target_tiles(rows, g * GROUP, errors, g, coupling.pulls[g], targets)
            improve_tiles(targets, problem, turn, levels, codes, turned)
            stored = as_stored(fmt, even_levels(levels) if problem.grid else levels)
            better, gains = np.empty(count, np.uint8), np.empty(count, np.float32)
            keep_better(
                targets, turned, problem, (before, old.codes), (expand(fmt, stored), codes), better, gains
            )
            found[g] = GroupFit(np.where(better[:, None] > 0, stored, old.stored), codes, gains)
            error_tiles(rows, g * GROUP, expand(fmt, found[g].stored), codes, errors[g])
    return found


_DENSE = np.empty(0, np.float32)


@compiled
def error_tiles(rows, column, levels, codes, errors):
    """errors f32 [tiles, 256, 16]: the group of rows f32 [R, K_in] at `column` minus levels f32 [R, K] by codes u8
    [R, 256].

    A tile is sixteen rows; lanes beyond the last row hold zeros.
    """
    for tile in range(errors.shape[0]):
        first, block = tile * LANES, errors[tile]
        gather(rows, first, column, block)
        for r in range(min(LANES, rows.shape[0] - first)):
            for i in range(GROUP):
                block[i, r] -= levels[first + r, codes[first + r, i]]


@compiled
def target_tiles(rows, column, errors, group, pulls, targets):
    """targets f32 [tiles, 256, 16]: the group of rows f32 [R, K_in] at `column`, moved by the errors of all others.

    errors f32 [G, tiles, 256, 16]; pulls f32 [G - 1, 256, 256] leave out the group, and come in the order of groups.
    """
    for tile in range(targets.shape[0]):
        block = targets[tile]
        gather(rows, tile * LANES, column, block)
        for other in range(pulls.shape[0]):
            e = errors[other if other < group else other + 1, tile]
            for i in range(0, GROUP, PANEL):
                product(block, i, pulls[other], i, e, GROUP)


@compiled
def improve_tiles(targets, problem, turn, levels_io, codes_io, turned):
    """One warm round, with the shakes of `turn`, from levels f32 [R, K] and codes u8 [R, 256], which it replaces.

    `problem` has a dense H, and turned f32 [tiles, 256, 16] receives H · targets.
    """
    problem = Problem(lined_up(problem.matrix), *problem[1:])
    s = scratch_for(levels_io.shape[1], problem.grid)
    total = total_of(problem)
    for tile in range(targets.shape[0]):
        first = tile * LANES
        s.y[:] = targets[tile]
        gather(codes_io, first, 0, s.codes)
        gather_levels(levels_io, first, s.levels)
        pulled(problem, s.y, s.ys)
        turned[tile] = s.ys
        improve(problem, total, turn, SHAKE, s)
        scatter_levels(s.levels, levels_io, first)
        scatter(s.codes, codes_io, first)


@compiled
def keep_better(targets, turned, problem, old, new, better, gains):
    """Settle the new codes u8 [R, 256], given their stored levels f32 [R, K], and put the old ones back where they cost
    less under a dense H. `old` and `new` are pairs of levels and codes.

    better u8 [R] says where the new ones stay. gains f32 [R] are those of what stays. With errors e of the old and f of
    the new, the cost falls by (e - f)ᵀ H (e + f), which is exact where both are nearly the same.
    """
    problem = Problem(lined_up(problem.matrix), *problem[1:])
    levels, codes = new
    s = scratch_for(levels.shape[1], problem.grid)
    was = scratch_for(levels.shape[1], problem.grid)
    ones = np.ones(GROUP, np.float32)
    rise, whole, lost = (
        np.empty((1, LANES), np.float32),
        np.empty((1, LANES), np.float32),
        np.empty((1, LANES), np.float32),
    )
    nothing = np.zeros((1, LANES), np.float32)
    for tile in range(targets.shape[0]):
        first = tile * LANES
        s.y[:] = targets[tile]
        gather(codes, first, 0, s.codes)
        gather_levels(levels, first, s.levels)
        settle(problem, s)
        gather(old[1], first, 0, was.codes)
        gather_levels(old[0], first, was.levels)
        residual(s.y, was.levels, was.codes, was.errors)
        for i in range(GROUP):
            e, f = load(was.errors, i), load(s.errors, i)
            store(was.work, i, e - f)
            store(was.y, i, e + f)
        multiply(problem.matrix, was.y, was.ys)  # -H (e + f)
        store(rise, 0, weighted_dot(ones, was.ys, was.work))
        zero, change = load(nothing, 0), load(rise, 0)
        for i in range(GROUP):
            store(s.errors, i, where_gt(zero, change, load(s.errors, i), load(was.errors, i)))
            store(s.codes, i, where_gt(zero, change, load(s.codes, i), load(was.codes, i)))
        store(whole, 0, weighted_dot(ones, turned[tile], s.y))
        store(lost, 0, weighted_dot(ones, turned[tile], s.errors))
        write_gains(whole, lost, first, gains)
        scatter(s.codes, codes, first)
        for r in range(min(LANES, better.shape[0] - first)):
            better[first + r] = 1 if rise[0, r] < 0 else 0
