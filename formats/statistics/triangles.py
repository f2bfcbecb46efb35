"""The packing of symmetric matrices: of a moment [k, k] the upper triangle is kept, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..jit import compiler
from .moment_file import triangle

F64 = NDArray[np.float64]

ROWS = 16
"""Rows that become columns at once, so that whole lines of the cache are written."""

compiled = compiler(Path(__file__))


def pack_moment(moment: F64) -> NDArray[np.float32]:
    """The upper triangle, row by row, of a symmetric f64 [k, k], as f32 [k(k+1)/2]."""
    return _upper(moment.astype(np.float32))


def _upper(matrix: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([row[i:] for i, row in enumerate(matrix)])


def unpack_moment(packed: NDArray[np.float32] | NDArray[np.float16], k: int) -> F64:
    """The symmetric f64 [k, k] of a packed upper triangle."""
    assert packed.shape == (triangle(k),)
    out = np.empty((k, k))
    _unpack(np.ascontiguousarray(packed, np.float32), out)
    return out


@compiled
def _unpack(packed, out):  # type: ignore[no-untyped-def]
    k = len(out)
    for top in range(0, k, ROWS):
        bottom = min(top + ROWS, k)
        for i in range(top, bottom):
            before = i * k - i * (i + 1) // 2  # where row i would begin if it began in column 0
            for j in range(i, k):
                out[i, j] = packed[before + j]
        for j in range(top, k):
            for i in range(top, min(bottom, j)):
                out[j, i] = packed[i * k - i * (i + 1) // 2 + j]


def pack_correlation(moment: F64) -> NDArray[np.float16]:
    """The correlations m_ij / √(m_ii m_jj) of a second moment, packed, f16; 0 where a channel is silent."""
    root = np.sqrt(np.diag(moment))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return _upper((moment * inverse[:, None] * inverse).astype(np.float16))


def unpack_correlation(packed: NDArray[np.float16], diagonal: NDArray[Any]) -> F64:
    """The second moment f64 [k, k] of packed correlations and its exact diagonal [k]."""
    exact = diagonal.astype(np.float64)
    root = np.sqrt(exact)
    out = unpack_moment(packed, len(exact))
    out *= root[:, None] * root  # in this order the result is symmetric to the last bit
    np.fill_diagonal(out, exact)
    return out
