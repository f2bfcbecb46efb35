"""LAPACK's Cholesky factor and triangular inverse, in place and while other threads run.

scipy's own wrappers of these two routines hold the interpreter's lock, so that no other thread could run meanwhile.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def _routine(name: str, *arguments: Any) -> Any:
    address = get_cython_function_address("scipy.linalg.cython_lapack", name)
    return ctypes.CFUNCTYPE(None, *arguments)(address)


_INT = ctypes.POINTER(ctypes.c_int)
_POTRF = _routine("dpotrf", ctypes.c_char_p, _INT, ctypes.c_void_p, _INT, _INT)
_TRTRI = _routine("dtrtri", ctypes.c_char_p, ctypes.c_char_p, _INT, ctypes.c_void_p, _INT, _INT)


def cholesky(a: F64) -> bool:
    """Replace the lower triangle of a symmetric f64 [K, K] by L, with L Lᵀ = a; the upper triangle stays as it is.

    False where a is not positive definite; then the lower triangle is of no use.
    """
    n, info = ctypes.c_int(_side(a)), ctypes.c_int()
    _POTRF(b"U", n, a.ctypes.data, n, info)  # LAPACK counts by columns: our lower triangle is its upper one
    return info.value == 0


def invert_lower(a: F64) -> bool:
    """Replace the lower triangle of f64 [K, K] by its inverse; the rest stays as it is. False where it is singular."""
    n, info = ctypes.c_int(_side(a)), ctypes.c_int()
    _TRTRI(b"U", b"N", n, a.ctypes.data, n, info)
    return info.value == 0


def _side(a: F64) -> int:
    assert (
        a.dtype == np.float64 and a.flags.c_contiguous and a.flags.writeable and a.shape == (len(a), len(a))
    )
    return len(a)
