"""Down answers gate and up: w2 is fitted to what the rounded gate and up really give it.

With h the product that the source's w1 and w3 give for a token, and ĥ the one that the rounded matrices give, the
matrix that comes nearest to w2·h for given ĥ is w2 · E[h ĥᵀ] · E[ĥ ĥᵀ]⁻¹. Both moments come from the expert's tokens,
so both are drawn toward the case ĥ = h by λ times the mean energy: with few tokens w2 stays as it is. Computed is the
change of w2, w2 · E[(h - ĥ) ĥᵀ] · E[ĥ ĥᵀ]⁻¹: it is small beside w2, so f32 is enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...awq.own_moments import Sums, pieces, summed
from ...formats.lapack import cholesky, divide

F32 = NDArray[np.float32]

RIDGE = 5.0
"""λ = 5 · K / n for K inputs and n tokens. On held-out tokens of two models the best λ was about 0.1 at 51 tokens per
input, 0.5 at 10 and 3 at 1.6."""


def silu(x: F32) -> F32:
    """x · sigmoid(x), f32, without overflow."""
    out = np.maximum(x, np.float32(-80))
    np.negative(out, out=out)
    np.exp(out, out=out)
    out += np.float32(1)
    np.divide(x, out, out=out)
    return out


def product(inputs: F32, w1: F32, w3: F32) -> F32:
    """What w2 sees of inputs f32 [n, hidden]: silu(x·w1ᵀ) · (x·w3ᵀ), f32 [n, intermediate]."""
    gate: F32 = inputs @ w1.T
    out = silu(gate)
    out *= inputs @ w3.T
    return out


def answering_down(w2: F32, there: F32, here: F32, sums: Sums | None = None) -> F32:
    """w2 f32 [hidden, K] fitted so that it makes of `here` f32 [n, K] what the source's w2 makes of `there`.

    Both are the inputs of w2 for the same tokens: `there` from the source's gate and up, `here` from rounded ones. Rows
    that are not finite are left out; without others w2 stays as it is. `sums` are those of `here`, where they are
    known.
    """
    width = w2.shape[1]
    finite = np.isfinite(there.sum(axis=1) + here.sum(axis=1))
    count = int(finite.sum())
    if not count:
        return w2
    kept = finite if count < len(there) else None
    lost = np.zeros((width, width))
    for a, b in zip(pieces(there, kept), pieces(here, kept), strict=True):
        lost += (a - b).T @ b
    if sums is None or kept is not None:
        sums = summed(here, kept)
    within = sums.astype(np.float64)
    energy = float(np.trace(within)) / width
    if not (np.isfinite(lost).all() and np.isfinite(within).all() and energy > 0):
        return w2
    lost /= energy
    within /= energy
    within[np.diag_indices(width)] += RIDGE * width / count
    if not cholesky(within):
        return w2
    change, factor = lost.astype(np.float32), within.astype(np.float32)
    divide(change, factor)
    divide(change, factor, transposed=True)
    fitted: F32 = w2 @ change
    fitted += w2
    return fitted
