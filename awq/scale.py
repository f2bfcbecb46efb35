"""Scales that move precision to the channels that matter: the shared gate/up one, and the one folded into up and down.

Weights are multiplied by the f16-rounded scale along K before the rotation; the runtime divides its input by the same
f16 values. Depends on numpy; all arithmetic is f64 until the result is rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REFERENCE_ALPHA = 0.55
_LOW, _HIGH = 1e-2, 1e2
_FOLD_LIMIT = 8
"""Largest power of two, up or down, that is folded into a row of up: f16 levels stay far from their limits."""


def gate_up_scale(energy: NDArray[np.float64], alpha: float) -> NDArray[np.float16]:
    """The shared scale f16 [hidden] from summed squares f64 [hidden]: log s = α/2 · log v minus its mean, clipped to
    [0.01, 100].

    Channels without energy count as the smallest one that has some. α = 0 gives ones.
    """
    positive = energy[energy > 0]
    floor = float(positive.min()) if len(positive) else 1.0
    log_s = 0.5 * alpha * np.log(np.maximum(energy, floor))
    log_s = np.clip(log_s - log_s.mean(), np.log(_LOW), np.log(_HIGH))
    scale: NDArray[np.float16] = np.exp(log_s).astype(np.float16)
    return scale


def down_fold(diagonal: NDArray[np.float64], exponent: float) -> NDArray[np.float32]:
    """Powers of two t f32 [intermediate]: row j of up is divided by t_j, column j of down multiplied by it.

    t follows E[x²] at down to the power exponent / 2, about a mean of 1.
    """
    positive = diagonal[diagonal > 0]
    floor = float(positive.min()) if len(positive) else 1.0
    log_t = 0.5 * exponent * np.log2(np.maximum(diagonal, floor))
    steps = np.clip(np.rint(log_t - log_t.mean()), -_FOLD_LIMIT, _FOLD_LIMIT)
    fold: NDArray[np.float32] = np.exp2(steps).astype(np.float32)
    return fold
