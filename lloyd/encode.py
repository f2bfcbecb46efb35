"""From rotated rows to the bytes of one block format, by one of three fits.

`reference` is the engine's own quantiser; `exact` takes the best levels in plain squared error and rounds to nearest;
`hessian` rounds and refits under each group's Hessian, then moves the levels toward unbiased ones. Every call runs on
one thread without the interpreter's lock, so callers encode matrices in parallel and get the same bytes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..formats.blocks import (
    MQ2_LLOYD,
    MQ3_LLOYD,
    MQ4,
    MQ6,
    AffineFormat,
    FloatFormat,
    Format,
    LloydFormat,
    Q8Format,
)
from ..formats.fwht import SIGNS2
from . import engine_quantiser as reference
from .codes.descent import shake_signs
from .constants import F16_MAX, F16_SMALLEST, GRID_STEPS, GROUP, ROUNDS, SWEEPS
from .group import Problem, fit_rows, nearest_rows, settle_rows
from .hessian.group import GroupHessian
from .hessian.row import RowHessian, compensate
from .levels.affine import affine_rows
from .levels.kmeans import kmeans_rows

Fit = Literal["reference", "exact", "hessian"]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

Rotated = LloydFormat | AffineFormat
ENCODED: tuple[Rotated, ...] = (MQ4, MQ6, MQ2_LLOYD, MQ3_LLOYD)
"""The rotated formats that are encoded: those in which the engine runs experts. MQ4-Lloyd is only decoded."""
SHAKES = shake_signs(ROUNDS * SWEEPS)
_NO_CODES = np.empty((0, GROUP), np.uint8)


def encode_plain(values: F32, fmt: Format, fit: Fit) -> U8:
    """Payload u8 [bytes] of f32 values of any shape in an unrotated format: F16, F32 or Q8F16."""
    if isinstance(fmt, FloatFormat):
        return fmt.pack(values).reshape(-1)
    if not isinstance(fmt, Q8Format):
        raise TypeError(f"{fmt.name} is not a plain format")
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, fmt.group)
    scale, codes = reference.q8(groups) if fit == "reference" else _q8(groups)
    return fmt.pack(scale, codes).reshape(-1)


def _q8(groups: F32) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Q8F16 with the scale rounded to f16 before it divides; a scale that would underflow becomes the smallest f16."""
    amax = np.abs(groups).max(axis=1)
    scale = np.minimum(amax / np.float32(127), np.float32(F16_MAX)).astype(np.float16)
    scale = np.where((scale == 0) & (amax > 0), np.float16(F16_SMALLEST), scale)
    divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
    codes = np.clip(np.rint(groups / divisor[:, None]), -127, 127)
    return scale, codes.astype(np.int8)


def encode_rotated(
    rows: F32, fmt: Format, fit: Fit, hessian: RowHessian | None = None, gain: float = 1.0
) -> U8:
    """Payload u8 [bytes] of rotated rows f32 [R, K], K a multiple of 256, group by group along each row.

    Only the fit `hessian` uses `hessian`, and without one it rounds as `exact` does. `gain` is how far its last step
    goes from least squares, 0, to unbiased levels, 1 (see partial_gains). Raises TypeError where `fmt` is
    not one of ENCODED.
    """
    if not isinstance(fmt, LloydFormat | AffineFormat):
        raise TypeError(f"{fmt.name} is not a rotated format")
    if fmt not in ENCODED:
        raise TypeError(f"{fmt.name} is only decoded")
    count, groups = len(rows), rows.shape[1] // GROUP
    out = np.empty((count, groups, fmt.group_bytes), np.uint8)
    codes = np.zeros((count, GROUP), np.uint8)
    if fit == "hessian" and hessian is not None:
        if hessian.answers:
            rows = rows.copy()
        for g, factored in enumerate(hessian.groups):
            column = g * GROUP
            stored, gains = _hessian_group(rows, column, fmt, factored, codes)
            if hessian.answers:
                decoded = np.take_along_axis(_expand(fmt, stored), codes.astype(np.int64), axis=1)
                compensate(rows, g, rows[:, column : column + GROUP] - decoded, hessian.answers)
            # The gain moves levels away from least squares on purpose. It follows `compensate`, or later groups would
            # correct it.
            if gain:
                stored = _stored(fmt, stored * partial_gains(gains, gain)[:, None])
            out[:, g] = _pack(fmt, stored, codes)
    else:
        plain: Fit = "exact" if fit == "hessian" else fit
        for g in range(groups):
            out[:, g] = _plain_group(rows, g * GROUP, fmt, plain, codes)
    return out.reshape(-1)


def partial_gains(unbiased: F32, gain: float) -> F32:
    """Factors f32 for levels from those that make them unbiased: 1 / (1 - D), where a share D of the energy is lost.

    Least squares give ŷ = (1 - D)·y and noise of variance D (1 - D)·y². Where a share ρ of the noise counts, since the
    rest averages out, c·ŷ is nearest to y in the mean at c = 1 / (1 - D (1 - ρ)); `gain` is 1 - ρ.
    """
    one = np.float32(1)
    return np.asarray(unbiased / (one + np.float32(1 - gain) * (unbiased - one)), np.float32)


def _plain_group(rows: F32, column: int, fmt: Rotated, fit: Fit, codes: U8) -> U8:
    if fit == "reference":
        if isinstance(fmt, AffineFormat):
            return fmt.pack(*reference.affine(rows[:, column : column + GROUP], fmt.levels))
        levels = np.empty((len(rows), fmt.levels), np.float32)
        reference.lloyd_rows(rows, column, levels, codes)
        return _pack(fmt, _stored(fmt, levels), codes)
    if isinstance(fmt, AffineFormat):
        params = np.empty((len(rows), 2), np.float32)
        affine_rows(rows, column, fmt.levels, GRID_STEPS, params, codes)
        return _pack(fmt, params, codes)
    stored = _stored(fmt, _initial_levels(rows, column, fmt, exact=True))
    nearest_rows(rows, column, stored, codes)
    return _pack(fmt, stored, codes)


def _hessian_group(rows: F32, column: int, fmt: Rotated, h: GroupHessian, codes: U8) -> tuple[F32, F32]:
    """Stored levels of one group under its Hessian, and each row's gain f32 [R]; codes u8 [R, 256] are written."""
    grid = isinstance(fmt, AffineFormat)
    levels = _expand(fmt, _initial_levels(rows, column, fmt, exact=h.nearly_white))
    problem = Problem(h.matrix, h.feedback, h.diagonal, SIGNS2, SHAKES, grid)
    fit_rows(rows, column, problem, ROUNDS, levels, codes)
    if grid:
        step = (levels[:, -1].astype(np.float64) - levels[:, 0]) / (fmt.levels - 1)
        levels = np.stack([levels[:, 0], step.astype(np.float32)], axis=1)
    stored = _stored(fmt, levels)
    gains = np.empty(len(rows), np.float32)
    settle_rows(rows, column, problem, _expand(fmt, stored), codes, gains)
    return stored, gains


def _initial_levels(rows: F32, column: int, fmt: Rotated, exact: bool) -> F32:
    """Centroids f32 [R, K], or (zero, scale) f32 [R, 2], best in plain squared error."""
    if isinstance(fmt, AffineFormat):
        params = np.empty((len(rows), 2), np.float32)
        affine_rows(rows, column, fmt.levels, GRID_STEPS, params, _NO_CODES)
        return params
    levels = np.empty((len(rows), fmt.levels), np.float32)
    kmeans_rows(rows, column, exact, levels)
    return levels


def _stored(fmt: Rotated, levels: F32) -> F32:
    """Levels, or (zero, scale), rounded to the precision in which the format stores them, as f32."""
    if isinstance(fmt, AffineFormat):
        return levels.astype(np.float32)
    return np.clip(levels, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)


def _expand(fmt: Rotated, stored: F32) -> F32:
    """All levels f32 [R, K], computed as the decoder computes them."""
    if isinstance(fmt, AffineFormat):
        steps = np.arange(fmt.levels, dtype=np.float32)
        return np.asarray(stored[:, :1] + stored[:, 1:] * steps, np.float32)
    return np.ascontiguousarray(stored)


def _pack(fmt: Rotated, stored: F32, codes: U8) -> U8:
    if isinstance(fmt, AffineFormat):
        return fmt.pack(np.ascontiguousarray(stored[:, 1]), np.ascontiguousarray(stored[:, 0]), codes)
    return fmt.pack(stored.astype(np.float16), codes)
