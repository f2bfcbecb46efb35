"""Rows of down answer each other: how a model's predictions take errors behind a layer decides what a row makes good.

With g the gradient of the model's log-probabilities behind a layer, E[g gᵀ] says what an error e there costs, about
½ eᵀ E[g gᵀ] e. Down writes into that stream, so its rows' errors E [hidden, K] cost tr(G E H Eᵀ), where H is the moment
of its inputs, and G the sensitivity, E[g gᵀ] of gradients of length 1: otherwise a few tokens whose gradients are long
would decide, and more tokens were needed to know as much. Factored as G = Vᵀ V with V lower triangular, what rows b
add, given the errors of all rows before them, is least where they miss -V_bb⁻¹ V_b: of these. So down is rounded in
blocks of rows, each toward a target that answers the blocks before it, as the groups of a row answer each other under
H.

Source: two-sided feedback as in "Model-Preserving Adaptive Rounding" (Tseng and others, 2025), by blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..formats.lapack import cholesky

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BLOCKS = 16
"""Blocks into which the rows are cut. 64 give nothing more that is seen (docs/quality.md)."""
DAMPING = 0.01
"""Share of the mean that every direction of G gets at least before it is factored."""
CAUTION = 2.5
"""How many times the share of noise each direction gets: G is divided by too, where small eigenvalues count. At six
tokens a channel 2.5 times has 1 to 4 % less KLD than once.
"""

RowAnswers = tuple[tuple[slice, F32], ...]
"""For each block its rows, and what of the errors of all rows before them is added to their target, f32 [rows, before].
"""


@dataclass(frozen=True)
class Sensitivity:
    """What errors behind a layer cost: E[g gᵀ] f64 [hidden, hidden] of gradients of length 1, over so many `tokens`."""

    moment: F64
    tokens: int


def cost_factor(sensitivity: Sensitivity) -> F64 | None:
    """V f64 [hidden, hidden], lower triangular: an error e behind the layer costs |V e|², in the mean of directions its
    square. None where nothing is known of what errors there cost.
    """
    moment, width = sensitivity.moment, len(sensitivity.moment)
    mean = float(np.trace(moment)) / width if np.isfinite(moment).all() else 0.0
    if not mean > 0:
        return None
    # All that is written goes to one place: to fetch new memory takes longer than what is done in it.
    room = np.empty_like(moment)
    share = min(max(CAUTION * _noise_share(sensitivity, room), DAMPING), 1.0)
    # The factor of the matrix read backwards is V, read backwards: V is lower, and G = Vᵀ V.
    np.multiply(moment[::-1, ::-1], (1 - share) / mean, out=room)
    room[np.diag_indices(width)] += share
    if not cholesky(room):
        return None
    room[~np.tri(width, dtype=np.bool_)] = 0
    return room[::-1, ::-1].T


def row_answers(lower: F64 | None) -> RowAnswers | None:
    """How the rows of a matrix that writes into a stream answer each other, where errors cost there what this
    `cost_factor` f64 [hidden, hidden] says; None where nothing is known of that.
    """
    if lower is None:
        return None
    width = len(lower)
    size = -(-width // BLOCKS)
    blocks = [slice(start, min(start + size, width)) for start in range(0, width, size)]
    return tuple((b, _share(lower, b)) for b in blocks)


def _noise_share(sensitivity: Sensitivity, room: F64) -> float:
    """The share of the identity in the best mixture with it, noise / (noise + distance): Ledoit and Wolf, "A
    well-conditioned estimator for large-dimensional covariance matrices" (2004). Of rows of length 1 the noise follows
    from their moment alone. `room` f64 [hidden, hidden] is overwritten.
    """
    energy = float(np.square(sensitivity.moment, out=room).sum())
    noise = max(1 - energy, 0.0) / sensitivity.tokens
    distance = max(energy - 1 / len(sensitivity.moment) - noise, 0.0)
    return noise / (noise + distance) if noise + distance > 0 else 1.0


def _share(lower: F64, rows: slice) -> F32:
    within, before = lower[rows, rows], lower[rows, : rows.start]
    return np.asarray(np.linalg.solve(within, before), np.float32)
