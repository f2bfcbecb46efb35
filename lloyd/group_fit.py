"""One group of all rows, in the precision of a block format: initial levels, then the fit under the group's Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..formats.blocks import AffineFormat, LloydFormat
from ..formats.fwht import SIGNS2
from .codes.descent import shake_signs
from .constants import F16_MAX, GRID_STEPS, GROUP, INDEPENDENT, LONE, SWEEPS, WHOLE, WHOLE_SWEEPS
from .dense.fit import fit_dense
from .group import Problem, fit_rows, settle_rows
from .hessian.group import GroupHessian
from .levels.affine import affine_rows
from .levels.kmeans import kmeans_rows

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

Rotated = LloydFormat | AffineFormat
WARM, FIRST = 1, True
SIGNS = shake_signs(max(map(len, (INDEPENDENT, WHOLE, LONE))) * SWEEPS)
_NO_CODES = np.empty((0, GROUP), np.uint8)


@dataclass(frozen=True)
class GroupFit:
    """Of one group of R rows: `stored` f32 are its levels [R, K], or (zero, scale) [R, 2], as the format stores them;
    codes u8 [R, 256]; `gains` f32 [R] make each row's levels unbiased, and are not applied yet.
    """

    stored: F32
    codes: U8
    gains: F32


def fit_group(
    rows: F32,
    column: int,
    fmt: Rotated,
    h: GroupHessian,
    shakes: Sequence[np.float32] = INDEPENDENT,
    coupled: bool = False,
) -> GroupFit:
    """The group of rows f32 [R, K_in] that begins at `column`, fitted under its Hessian.

    There is a round of descent and refit for each of the `shakes`. What is `coupled` is fitted again later, and gets no
    gains here.
    """
    grid = isinstance(fmt, AffineFormat)
    initial = initial_levels(rows, column, fmt, exact=h.nearly_white)
    codes, gains = np.empty((len(rows), GROUP), np.uint8), np.empty(0 if coupled else len(rows), np.float32)
    if not h.diagonal.size:
        of = (h.matrix, h.feedback, SIGNS, np.array(shakes), WHOLE_SWEEPS if coupled else SWEEPS)
        fit_dense(rows, column, *of, fmt.levels, initial, codes, gains)
        return GroupFit(initial, codes, gains)
    levels = expand(fmt, initial)
    problem = Problem(h.matrix, h.feedback, h.diagonal, SIGNS2, SIGNS, grid)
    fit_rows(rows, column, problem, np.array(shakes), levels, codes)
    stored = as_stored(fmt, even_levels(levels) if grid else levels)
    settle_rows(rows, column, problem, expand(fmt, stored), codes, gains)
    return GroupFit(stored, codes, gains)


def even_levels(levels: F32) -> F32:
    """(zero, scale) f32 [R, 2] of evenly spaced levels f32 [R, K]: the first one, and the mean step."""
    step = (levels[:, -1].astype(np.float64) - levels[:, 0]) / (levels.shape[1] - 1)
    return np.stack([levels[:, 0], step.astype(np.float32)], axis=1)


def initial_levels(rows: F32, column: int, fmt: Rotated, exact: bool) -> F32:
    """Centroids f32 [R, K], or (zero, scale) f32 [R, 2], best in plain squared error."""
    if isinstance(fmt, AffineFormat):
        params = np.empty((len(rows), 2), np.float32)
        affine_rows(rows, column, fmt.levels, GRID_STEPS, params, _NO_CODES)
        return params
    levels = np.empty((len(rows), fmt.levels), np.float32)
    kmeans_rows(rows, column, exact, levels)
    return levels


def as_stored(fmt: Rotated, levels: F32) -> F32:
    """Levels, or (zero, scale), rounded to the precision in which the format stores them, as f32."""
    if isinstance(fmt, AffineFormat):
        return levels.astype(np.float32)
    return np.clip(levels, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)


def expand(fmt: Rotated, stored: F32) -> F32:
    """All levels f32 [R, K], computed as the decoder computes them."""
    if isinstance(fmt, AffineFormat):
        steps = np.arange(fmt.levels, dtype=np.float32)
        return np.asarray(stored[:, :1] + stored[:, 1:] * steps, np.float32)
    return np.ascontiguousarray(stored)
