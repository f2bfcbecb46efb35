"""The Hessian of one group's output error, in the stored basis, and its factor for error feedback.

With E[x²] = d known per input channel and s the AWQ scale, E(q) = (y-q)ᵀ H (y-q) with H = R diag(d/s²) Rᵀ. Since the
entries of the Walsh-Hadamard matrix multiply as W_aj W_bj = W_(a xor b)j, H_ab = σ_a σ_b ĥ[a xor b] / 256 with ĥ the
transform of d/s² and σ the second sign vector: no matrix product is needed, and H⁻¹ has the same form with s²/d.

All factors are computed here in f64, in a fixed order, and stored as f32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...formats.fwht import SIGNS2
from ..constants import GROUP, WEIGHT_RANGE, WHITE_RATIO
from ..loops import compiled

_XOR = np.arange(GROUP)[:, None] ^ np.arange(GROUP)[None, :]
_SIGNS = np.outer(SIGNS2, SIGNS2).astype(np.float64)
UNUSABLE = "no usable importance"


@dataclass(frozen=True)
class GroupHessian:
    """H f32 [256, 256] of one group; `feedback` f32 [256, 256], unit lower triangular: an error e_j of column j moves
    the target of column i > j by -feedback[i, j]·e_j; `diagonal` f32 [256] is d/s² where H came from it, else empty.

    H is scaled so that its mean diagonal is 1: only ratios matter to rounding.
    """

    matrix: NDArray[np.float32]
    feedback: NDArray[np.float32]
    diagonal: NDArray[np.float32]
    note: str = ""

    @property
    def nearly_white(self) -> bool:
        """Whether all channels weigh about the same: then refits hardly leave the basin of the initial levels."""
        return self.diagonal.size > 0 and nearly_equal(self.diagonal)


def nearly_equal(weights: NDArray[np.float32]) -> bool:
    """Whether the largest of some channel weights f32 is less than WHITE_RATIO times the smallest."""
    return bool(weights.max() < WHITE_RATIO * weights.min())


@compiled
def transform(x):
    """The unnormalised Walsh-Hadamard transform of f64 [256], in place."""
    stride = 1
    while stride < x.shape[0]:
        for base in range(0, x.shape[0], 2 * stride):
            for i in range(base, base + stride):
                a, b = x[i], x[i + stride]
                x[i], x[i + stride] = a + b, a - b
        stride *= 2


@compiled
def cholesky_upper(a):
    """Overwrite the upper triangle of symmetric f64 a [n, n] with U, a = Uᵀ U; False where a pivot is not positive."""
    n = a.shape[0]
    for j in range(n):
        pivot = a[j, j]
        if not pivot > 0.0:
            return False
        inverse = 1.0 / np.sqrt(pivot)
        for k in range(j, n):
            a[j, k] *= inverse
        for i in range(j + 1, n):
            factor = a[j, i]
            for k in range(i, n):
                a[i, k] -= factor * a[j, k]
    return True


def _dyadic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """R diag(weights) Rᵀ for f64 weights [256]."""
    spectrum = weights.copy()
    transform(spectrum)
    out: NDArray[np.float64] = spectrum[_XOR] * _SIGNS / GROUP
    return out


def _unit_feedback(upper: NDArray[np.float64]) -> NDArray[np.float32]:
    """Feedback weights from the upper Cholesky factor of H⁻¹."""
    unit = np.triu(upper) / np.diag(upper)[:, None]
    return np.ascontiguousarray(unit.T, dtype=np.float32)


def identity() -> GroupHessian:
    """The Hessian of white inputs: rounding to nearest, least-squares levels."""
    eye = np.eye(GROUP, dtype=np.float32)
    return GroupHessian(eye, eye, np.ones(GROUP, np.float32))


def bounded(weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Channel weights f64 [256] bounded to a ratio of 1e6 and brought to mean 1; None where all are zero or one is not
    finite.
    """
    top = float(weights.max(initial=0.0))
    if not np.isfinite(weights).all() or top <= 0:
        return None
    w = np.maximum(weights / top, 1.0 / WEIGHT_RANGE)
    w /= w.mean()
    return np.asarray(w, np.float64)


def from_bounded(weights: NDArray[np.float64]) -> GroupHessian:
    """The Hessian of f64 channel weights [256] that `bounded` returned; such weights can always be factored."""
    upper = _dyadic(1.0 / weights)
    usable = cholesky_upper(upper)
    assert usable, "bounded channel weights were not positive definite"
    return GroupHessian(
        _dyadic(weights).astype(np.float32), _unit_feedback(upper), weights.astype(np.float32)
    )


def from_diagonal(weights: NDArray[np.float64]) -> GroupHessian:
    """The Hessian of f64 channel weights d/s² [256], non-negative, already damped.

    Weights are `bounded`. Where they are of no use the result is the identity, with a note that says so.
    """
    w = bounded(weights)
    if w is None:
        white = identity()
        return GroupHessian(white.matrix, white.feedback, white.diagonal, UNUSABLE)
    return from_bounded(w)
