"""The rotation as the matrix that defines it, for tests to compare with."""

from __future__ import annotations

import numpy as np
from mq_quant.formats.fwht import GROUP, SIGNS1, SIGNS2
from numpy.typing import NDArray


def matrix() -> NDArray[np.float64]:
    """R as f64 [256, 256]: rotate(x) = R @ x."""
    h = np.ones((1, 1))
    while len(h) < GROUP:
        h = np.block([[h, h], [h, -h]])
    out: NDArray[np.float64] = SIGNS2[:, None] * h * SIGNS1[None, :] / 16.0
    return out
