"""Scales that move precision to the channels that matter: the AWQ scale of a layer's gate and up, and folds.

Weights are multiplied along K by the scale, rounded to f16, before the rotation; the engine divides its input by the
same f16 values. All arithmetic is f64 until the result is rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REFERENCE_ALPHA = 0.55
"""The exponent of the engine's own tools, for the fits that do not search one."""
_LOW, _HIGH = 1e-2, 1e2
_FOLD_LIMIT = 8
"""Largest power of two, up or down, by which a row of w3 is divided: f16 levels stay far from their limits."""


def gate_up_scale(energy: NDArray[np.float64], alpha: float) -> NDArray[np.float16]:
    """The shared scale f16 [hidden] from summed squares f64 [hidden]: log s = α/2 · log v minus its mean, clipped to
    [0.01, 100].

    Channels without energy count like the channel with the smallest energy above 0. α = 0 gives ones.
    """
    positive = energy[energy > 0]
    floor = float(positive.min()) if len(positive) else 1.0
    log_s = 0.5 * alpha * np.log(np.maximum(energy, floor))
    log_s = np.clip(log_s - log_s.mean(), np.log(_LOW), np.log(_HIGH))
    scale: NDArray[np.float16] = np.exp(log_s).astype(np.float16)
    return scale


def down_fold(diagonal: NDArray[np.float64], exponent: float) -> NDArray[np.float32]:
    """The fold of an expert, powers of two t f32 [intermediate]: row j of w3 is divided by t_j, column j of w2 is
    multiplied by t_j.

    t follows E[x²] at down, f64 [intermediate], to the power exponent / 2, about a mean of 1.
    """
    positive = diagonal[diagonal > 0]
    floor = float(positive.min()) if len(positive) else 1.0
    log_t = 0.5 * exponent * np.log2(np.maximum(diagonal, floor))
    steps = np.clip(np.rint(log_t - log_t.mean()), -_FOLD_LIMIT, _FOLD_LIMIT)
    fold: NDArray[np.float32] = np.exp2(steps).astype(np.float32)
    return fold
