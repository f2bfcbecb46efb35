"""Routines of BLAS and LAPACK on triangles, in place and while other threads run.

scipy's own wrappers hold the interpreter's lock, so that no other thread could run meanwhile, and copy what does not
lie in columns. Arrays here lie in rows, which those routines take for columns: our lower triangle is their upper one.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_TEXT, _INT, _DATA = ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p


def _routine(module: str, name: str, *arguments: Any) -> Any:
    address = get_cython_function_address(f"scipy.linalg.cython_{module}", name)
    return ctypes.CFUNCTYPE(None, *arguments)(address)


_POTRF = _routine("lapack", "dpotrf", _TEXT, _INT, _DATA, _INT, _INT)
_TRTRI = {
    np.dtype(np.float32): _routine("lapack", "strtri", _TEXT, _TEXT, _INT, _DATA, _INT, _INT),
    np.dtype(np.float64): _routine("lapack", "dtrtri", _TEXT, _TEXT, _INT, _DATA, _INT, _INT),
}
_SYRK = _routine("blas", "ssyrk", _TEXT, _TEXT, _INT, _INT, _DATA, _DATA, _INT, _DATA, _DATA, _INT)
_TRSM = _routine("blas", "strsm", *[_TEXT] * 4, _INT, _INT, _DATA, _DATA, _INT, _DATA, _INT)
_ONE, _ZERO = (ctypes.byref(ctypes.c_float(value)) for value in (1, 0))


def cholesky(a: F64) -> bool:
    """Replace the lower triangle of a symmetric f64 [K, K] by L, with L Lᵀ = a; the upper triangle stays as it is.

    False where a is not positive definite; then the lower triangle is of no use.
    """
    assert a.dtype == np.float64
    n, info = ctypes.c_int(_side(a)), ctypes.c_int()
    _POTRF(b"U", n, a.ctypes.data, n, info)
    return info.value == 0


def invert_lower(a: F64 | F32) -> bool:
    """Replace the lower triangle of f64 or f32 [K, K] by its inverse; the rest stays as it is. False where it is
    singular.
    """
    n, info = ctypes.c_int(_side(a)), ctypes.c_int()
    _TRTRI[a.dtype](b"U", b"N", n, a.ctypes.data, n, info)
    return info.value == 0


def add_products(rows: F32, out: F32) -> None:
    """Add rowsᵀ · rows of rows f32 [n, K] to the lower triangle of out f32 [K, K]; the rest stays as it is."""
    width, count = ctypes.c_int(_side(out)), ctypes.c_int(len(rows))
    assert rows.dtype == out.dtype == np.float32 and rows.flags.c_contiguous
    assert rows.shape[1] == len(out)
    _SYRK(b"U", b"N", width, count, _ONE, rows.ctypes.data, width, _ONE, out.ctypes.data, width)


def add_pairs(rows: F32, out: F32) -> None:
    """Add rows · rowsᵀ of rows f32 [n, K] to the lower triangle of out f32 [n, n]; the rest stays as it is."""
    count, width = ctypes.c_int(_side(out)), ctypes.c_int(rows.shape[1])
    assert rows.dtype == out.dtype == np.float32 and rows.flags.c_contiguous
    assert len(rows) == len(out)
    _SYRK(b"U", b"T", count, width, _ONE, rows.ctypes.data, width, _ONE, out.ctypes.data, count)


def divide(rows: F32, lower: F32, transposed: bool = False) -> None:
    """Replace each row x of rows f32 [n, K] by L⁻¹ · x, or by L⁻ᵀ · x, where L is the lower triangle of f32 [K, K]."""
    width, count = ctypes.c_int(_side(lower)), ctypes.c_int(len(rows))
    assert rows.dtype == lower.dtype == np.float32 and rows.flags.c_contiguous and rows.flags.writeable
    assert rows.shape[1] == len(lower)
    turn = b"N" if transposed else b"T"
    _TRSM(b"L", b"U", turn, b"N", width, count, _ONE, lower.ctypes.data, width, rows.ctypes.data, width)


def _side(a: NDArray[Any]) -> int:
    assert a.dtype in _TRTRI and a.flags.c_contiguous and a.flags.writeable and a.shape == (len(a), len(a))
    return len(a)
