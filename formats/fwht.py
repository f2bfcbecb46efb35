"""The rotation of the MQ formats: y = S2 · H256 · S1 · x / 16 on each group of 256, and its inverse.

H256 is the Walsh-Hadamard matrix in Sylvester order; S1 and S2 are fixed ±1 diagonals. The rotation R is orthonormal
and every R_ij² is 1/256. Arithmetic is f32 (f64 of moments), butterflies of stride 1, 2, … 128, so results are the same
bits everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import WeightError
from .jit import compiler

GROUP = 256


def draw_signs(seed: int, count: int = GROUP) -> NDArray[np.float32]:
    """±1 f32 [count] from the format's linear congruential generator: + where bit 16 of the stepped state is set."""
    state, out = seed, np.empty(count, np.float32)
    for i in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out[i] = 1.0 if (state >> 16) & 1 else -1.0
    return out


SIGNS1: NDArray[np.float32] = draw_signs(42)
SIGNS2: NDArray[np.float32] = draw_signs(1042)


COLUMNS = 8
"""Columns that are transformed at once: 256 rows of so many f64 fill half of the innermost cache."""

compiled = compiler(Path(__file__))


@compiled
def _transform(groups, before, after):  # type: ignore[no-untyped-def]
    for g in range(groups.shape[0]):
        row = groups[g]
        for i in range(256):
            row[i] *= before[i]
        stride = 1
        while stride < 256:  # two stages at a time
            for base in range(0, 256, 4 * stride):
                for i in range(base, base + stride):
                    a, b = row[i], row[i + stride]
                    c, d = row[i + 2 * stride], row[i + 3 * stride]
                    row[i] = (a + b) + (c + d)
                    row[i + stride] = (a - b) + (c - d)
                    row[i + 2 * stride] = (a + b) - (c + d)
                    row[i + 3 * stride] = (a - b) - (c - d)
            stride *= 4
        for i in range(256):
            row[i] *= after[i]


@compiled
def _transform_columns(matrix, before, after, block):  # type: ignore[no-untyped-def]
    """`_transform` down each group of rows of matrix f64 [256·k, n], n a multiple of COLUMNS, in columns of `block`."""
    for top in range(0, matrix.shape[0], 256):
        for first in range(0, matrix.shape[1], COLUMNS):
            for i in range(256):
                for c in range(COLUMNS):
                    block[i, c] = matrix[top + i, first + c] * before[i]
            stride = 1
            while stride < 256:
                for base in range(0, 256, 4 * stride):
                    for i in range(base, base + stride):
                        for n in range(COLUMNS):
                            a, b = block[i, n], block[i + stride, n]
                            c, d = block[i + 2 * stride, n], block[i + 3 * stride, n]
                            block[i, n] = (a + b) + (c + d)
                            block[i + stride, n] = (a - b) + (c - d)
                            block[i + 2 * stride, n] = (a + b) - (c + d)
                            block[i + 3 * stride, n] = (a - b) - (c - d)
                stride *= 4
            for i in range(256):
                for c in range(COLUMNS):
                    matrix[top + i, first + c] = block[i, c] * after[i]


def _apply(
    x: NDArray[np.float32], before: NDArray[np.float32], after: NDArray[np.float32]
) -> NDArray[np.float32]:
    if x.ndim == 0 or x.shape[-1] % GROUP:
        raise WeightError(
            f"shape {x.shape} does not end in a multiple of {GROUP}: a group may not cross a row"
        )
    out = np.array(x, np.float32, order="C")
    _transform(out.reshape(-1, GROUP), before, after)
    return out


def rotate(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rotate each run of 256 along the last axis of f32 [..., 256·k]; a new array. WeightError for any other K."""
    return _apply(x, SIGNS1, SIGNS2 / np.float32(16))


def unrotate(y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo `rotate` up to f32 rounding."""
    return _apply(y, SIGNS2, SIGNS1 / np.float32(16))


def rotate_rows(matrix: NDArray[np.float64]) -> None:
    """Make of M f64 [n, 256·k] M Rᵀ, in f64 and for each group of columns."""
    assert matrix.dtype == np.float64 and matrix.flags.c_contiguous
    _transform(matrix.reshape(-1, GROUP), SIGNS1, SIGNS2 / np.float32(16))


def rotate_columns(matrix: NDArray[np.float64]) -> None:
    """Make of M f64 [256·k, n], n a multiple of 8, R M, in f64 and for each group of rows."""
    assert matrix.dtype == np.float64 and matrix.flags.c_contiguous
    _transform_columns(matrix, SIGNS1, SIGNS2 / np.float32(16), np.empty((GROUP, COLUMNS)))
