"""From rotated rows to the bytes of one block format, by one of three fits.

`reference` is the engine's own quantiser; `exact` takes the best levels in plain squared error and rounds to nearest;
`hessian` rounds and refits under each group's Hessian, whole rows twice where their groups are coupled, and then moves
the levels toward unbiased ones. Every call runs on one thread without the interpreter's lock, so callers encode
matrices in parallel and get the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from . import engine_quantiser as reference
from .constants import F16_MAX, F16_SMALLEST, GRID_STEPS, GROUP
from .group import nearest_rows
from .group_fit import F32, U8, GroupFit, Rotated, as_stored, fit_group, initial_levels
from .hessian.row import RowHessian
from .levels.affine import affine_rows
from .whole_row import fit_whole_rows

Fit = Literal["reference", "exact", "hessian"]
ENCODED: tuple[Rotated, ...] = (MQ4, MQ6, MQ2_LLOYD, MQ3_LLOYD)
"""The rotated formats that are encoded: those in which the engine runs experts. MQ4-Lloyd is only decoded."""


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
        for g, fitted in enumerate(_fits(rows, fmt, hessian)):
            stored = fitted.stored
            # The gain moves levels away from least squares on purpose. It comes last, or other groups would correct it.
            if gain:
                stored = as_stored(fmt, stored * partial_gains(fitted.gains, gain)[:, None])
            out[:, g] = _pack(fmt, stored, fitted.codes)
    else:
        plain: Fit = "exact" if fit == "hessian" else fit
        for g in range(groups):
            out[:, g] = _plain_group(rows, g * GROUP, fmt, plain, codes)
    return out.reshape(-1)


def _fits(rows: F32, fmt: Rotated, hessian: RowHessian) -> Iterable[GroupFit]:
    if hessian.answers:
        return fit_whole_rows(rows, fmt, hessian)
    return (fit_group(rows, g * GROUP, fmt, factored) for g, factored in enumerate(hessian.groups))


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
        return _pack(fmt, as_stored(fmt, levels), codes)
    if isinstance(fmt, AffineFormat):
        params = np.empty((len(rows), 2), np.float32)
        affine_rows(rows, column, fmt.levels, GRID_STEPS, params, codes)
        return _pack(fmt, params, codes)
    stored = as_stored(fmt, initial_levels(rows, column, fmt, exact=True))
    nearest_rows(rows, column, stored, codes)
    return _pack(fmt, stored, codes)


def _pack(fmt: Rotated, stored: F32, codes: U8) -> U8:
    if isinstance(fmt, AffineFormat):
        return fmt.pack(np.ascontiguousarray(stored[:, 1]), np.ascontiguousarray(stored[:, 0]), codes)
    return fmt.pack(stored.astype(np.float16), codes)
