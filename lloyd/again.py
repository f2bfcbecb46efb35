"""Whole rows again: each group is fitted to the target that answers the errors of all other groups of its row.

The first pass over a row fits a group while the later ones are still exact, and expects of them what no rounded group
can do. Here every group has been rounded. With errors e = y - ŷ, the pull on group g is p_g = Σ_r H_gr e_r over all
groups, and the best that it can do is ŷ_g near t_g = ŷ_g + H_gg⁻¹ p_g, under H_gg. It starts from the levels and codes
that stand: a warm round of descent and refit, rounding to the format's precision, and plain descent. What a row gets by
it is kept where it costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .codes.descent import BLOCKS
from .constants import GROUP, PASSES, SHAKE, WHOLE, WHOLE_SWEEPS
from .dense.fit import gain_of, settle, warm_round
from .dense.sums import add_up, refit
from .dense.tile import (
    add_decoded,
    begin,
    dense_of,
    gather_params,
    gather_rows,
    scatter_row,
    tile_for,
    to_rows,
    to_stored,
)
from .group_fit import F32, SIGNS, GroupFit, Rotated, expand
from .hessian.row import Coupling
from .loops import compiled, inlined
from .simd.lanes import PANEL, block_of, copy, gather, product
from .simd.vec import LANES, fma, load, splat, store, tree, where_eq


def fit_again(
    rows: F32, fmt: Rotated, coupling: Coupling, fits: Sequence[GroupFit], errors: F32
) -> list[GroupFit]:
    """The groups of rows f32 [R, K] after PASSES passes that begin with `fits`, the groups in their order.

    errors f32 [G, tiles, 256, 16] are those of `fits`, and change. The cost eᵀHe of no row rises, but for the rounding
    of f32. Gains are those of the last pass: the target's energy over what the levels have of it.
    """
    found = list(fits)
    for turn in range(len(WHOLE) - 1, len(WHOLE) - 1 - PASSES, -1):
        for g, old in enumerate(found):
            stored, codes, gains = old.stored.copy(), old.codes.copy(), np.empty(len(rows), np.float32)
            of = (coupling.lines[g], coupling.inverses[g])
            fit_group_again(errors, g, *of, SIGNS, turn, WHOLE_SWEEPS, fmt.levels, stored, codes, gains)
            found[g] = GroupFit(stored, codes, gains)
            error_tiles(rows, g * GROUP, expand(fmt, stored), codes, errors[g])
    return found


@compiled
def error_tiles(rows, column, levels, codes, errors):
    """errors f32 [tiles, 256, 16]: the group of rows f32 [R, K_in] at `column` minus levels f32 [R, K] by codes u8
    [R, 256].

    A tile is sixteen rows; lanes beyond the last row hold zeros.
    """
    for tile in range(errors.shape[0]):
        first, block = tile * LANES, errors[tile]
        count = min(LANES, rows.shape[0] - first)
        for r in range(count):
            for i in range(GROUP):
                block[i, r] = rows[first + r, column + i] - levels[first + r, codes[first + r, i]]
        for r in range(count, LANES):
            for i in range(GROUP):
                block[i, r] = 0.0


class Standing(NamedTuple):
    """What stands of sixteen rows: a block of lanes of codes, blocks of rows of pulls and of the values that the codes
    stand for, levels [K, 16], and line [2, 16] as in Tile.
    """

    codes: F32
    pulls: F32
    rows: F32
    levels: F32
    line: F32


@compiled
def fit_group_again(errors, group, lines, inverse, signs, turn, sweeps, count, params_io, codes_io, gains):
    """One warm round, with the shakes of `turn`, for a group whose stored levels, or (zero, scale), are params_io f32
    [R, n] and whose codes are codes_io u8 [R, 256]. Both are replaced where that costs less.

    errors f32 [G, tiles, 256, 16] are those of all groups, lines f32 [G, 256, 256] and `inverse` as in Coupling. gains
    f32 [R] are those of what stays. With pulls p of the old and q of the new, the cost falls by (ŷ_new - ŷ_old)ᵀ
    (p + q), which is exact where both are nearly the same.
    """
    grid = params_io.shape[1] == 2
    dense, t = dense_of(lines[group], signs, grid), tile_for(count, grid)
    old = Standing(block_of(GROUP), block_of(GROUP), block_of(GROUP), block_of(count), block_of(2))
    for first in range(0, codes_io.shape[0], LANES):
        gather(codes_io, first, 0, old.codes)
        gather_rows(codes_io, first, 0, t.codes)
        pull_tile(errors, first // LANES, lines, t.more)
        fit_tile_again(dense, t, old, first, inverse, turn, sweeps, params_io, codes_io, gains)


@inlined
def fit_tile_again(dense, t, old, first, inverse, turn, sweeps, params_io, codes_io, gains):
    """The sixteen rows from `first` on of `fit_group_again`. Codes are in old.codes and t.codes, pulls in t.more."""
    count = old.levels.shape[0]
    gather_params(params_io, first, dense.grid, t)
    copy(t.levels, 0, count, old.levels, 0)
    copy(t.line, 0, 2, old.line, 0)
    decoded(t.levels, old.codes, t.lanes)
    to_rows(t.lanes, np.float32(1), old.rows)
    for i in range(0, GROUP, PANEL):
        product(t.lanes, i, inverse, i, t.more, GROUP)
    to_rows(t.lanes, np.float32(1), t.y)
    to_rows(t.more, np.float32(1), old.pulls)
    add_up(dense, old.codes, t)
    copy(old.pulls, 0, GROUP, t.ys, 0)
    for r in range(LANES):
        add_decoded(dense, t, r, np.float32(1), t.ys, r * BLOCKS)
        begin(dense, t, r)
        copy(old.pulls, r * BLOCKS, BLOCKS, t.pull, 0)
        warm_round(dense, t, r, turn, sweeps, SHAKE)
    refit(dense, t)
    to_stored(dense.grid, t)
    for r in range(min(LANES, codes_io.shape[0] - first)):
        settle(dense, t, r)
        fall = splat(np.float32(0))
        for b in range(BLOCKS):
            at = r * BLOCKS + b
            fall = fma(load(t.row, b) - load(old.rows, at), load(old.pulls, at) + load(t.pull, b), fall)
        if not tree(fall) > 0:
            for k in range(count):
                t.levels[k, r] = old.levels[k, r]
            t.line[0, r], t.line[1, r] = old.line[0, r], old.line[1, r]
            for i in range(GROUP):
                t.codes[r * BLOCKS + i // LANES, i % LANES] = codes_io[first + r, i]
            begin(dense, t, r)
        scatter_row(t, r, params_io, codes_io, first + r)
        gains[first + r] = gain_of(t, r)


@inlined
def pull_tile(errors, tile, lines, out):
    """out = Σ_r H_gr e_r, a block of lanes, from errors f32 [G, tiles, 256, 16] and the H_gr, lines f32 [G, 256, 256],
    in the order of groups.
    """
    out[:] = 0.0
    for other in range(lines.shape[0]):
        for i in range(0, GROUP, PANEL):
            product(out, i, lines[other], i, errors[other, tile], GROUP)
    minus = splat(np.float32(-1))
    for i in range(GROUP):
        store(out, i, minus * load(out, i))


@inlined
def decoded(levels, codes, out):
    """out [256, 16] = levels [K, 16] by codes [256, 16]."""
    for i in range(GROUP):
        code, value = load(codes, i), load(levels, 0)
        for k in range(1, levels.shape[0]):
            value = where_eq(code, splat(np.float32(k)), load(levels, k), value)
        store(out, i, value)
