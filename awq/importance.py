"""The importance of every input channel of every expert matrix: one object, whatever the statistics behind it.

Shrinkage toward the layer, repair of broken entries and damping happen here and nowhere else, and every fallback is
kept in words. Depends on formats (imatrix, minimax, fwht) and numpy; all arithmetic is f64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ImatrixError
from ..formats.fwht import rotate_moment
from ..formats.minimax import PROJECTIONS, ModelConfig
from ..formats.statistics.imatrix import Imatrix, check_imatrix, coverage, expert_entry

F64 = NDArray[np.float64]

KAPPA = 32.0
"""Tokens that the layer's mean is worth: an expert seen n times keeps n / (n + κ) of its own statistics."""
TEMPER = 0.75
"""Exponent of the energies by which rounding weighs channels, where nothing else is known of them. Below 1 because a
mean of squares is made by few tokens with large values, while in a divergence of predictions every token counts alike.
"""
DAMPING = 0.05
"""Share of the mean weight that every channel gets."""


@dataclass(frozen=True)
class Importance:
    """What is known of the inputs of one matrix: diagonal E[x²] f64 [K], and E[x xᵀ] f64 [K, K] where it was gathered.

    `count` is the number of tokens behind it. Nothing here is damped or rotated yet.
    """

    diagonal: F64
    moment: F64 | None = None
    count: float = 0.0

    def channel_weights(
        self, scale: NDArray[np.float32] | None = None, damping: float = DAMPING, temper: float = TEMPER
    ) -> F64:
        """Tempered and damped E[x²] f64 [K], for inputs divided by the AWQ scale s f32 [K]."""
        d = self.diagonal**temper
        d = (1 - damping) * d + damping * d.mean()
        if scale is not None:
            d = d / np.square(scale.astype(np.float64))
        return np.asarray(d, np.float64)

    def rotated_moment(self, scale: NDArray[np.float32] | None = None, damping: float = DAMPING) -> F64:
        """Damped second moment f64 [K, K] of R·(x/s), R rotating each group of 256; without one, of channel_weights.

        A moment is not tempered: that loses more in its small eigenvalues than it gains.
        """
        if self.moment is None:
            full = np.diag(self.channel_weights(damping=damping))
        else:
            full = (1 - damping) * self.moment
            full[np.diag_indices_from(full)] += damping * self.diagonal.mean()
        if scale is not None:
            inverse = 1.0 / scale.astype(np.float64)
            full *= inverse[:, None]
            full *= inverse[None, :]
        return rotate_moment(full)


@dataclass(frozen=True)
class LayerImportance:
    """One layer: E[x²] f64 [experts, K] and tokens f64 [experts] per projection, repaired and shrunk, with notes."""

    layer: int
    diagonals: dict[str, F64]
    counts: dict[str, F64]
    fallbacks: tuple[str, ...]

    def of(self, expert: int, projection: str) -> Importance:
        """The importance of one expert's matrix."""
        return Importance(self.diagonals[projection][expert], count=float(self.counts[projection][expert]))

    def gate_up_energy(self) -> F64:
        """Σ over experts of the summed squares at gate and up, f64 [hidden]: what the shared AWQ scale follows."""
        total = np.zeros(self.diagonals["w1"].shape[1])
        for projection in ("w1", "w3"):
            total += (self.diagonals[projection] * self.counts[projection][:, None]).sum(axis=0)
        return total


@dataclass(frozen=True)
class ModelImportance:
    """The importances of a model, read layer by layer; `coverage` is the share of experts with data."""

    imatrix: Imatrix
    config: ModelConfig
    coverage: float

    def layer(self, layer: int) -> LayerImportance:
        """One layer's importances; ImatrixError where a projection has no usable value at all."""
        diagonals, counts, notes = {}, {}, []
        for projection in PROJECTIONS:
            entry = expert_entry(self.imatrix, layer, projection, self.config.num_local_experts)
            assert entry is not None
            diagonals[projection], counts[projection], found = repair(
                entry.sum2_mean, entry.counts, f"layer {layer} {projection}"
            )
            notes += found
        return LayerImportance(layer, diagonals, counts, tuple(notes))

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What had to be repaired, over all layers; reads the whole imatrix."""
        return tuple(note for n in range(self.config.num_hidden_layers) for note in self.layer(n).fallbacks)


def load_importance(imatrix: Imatrix, config: ModelConfig) -> ModelImportance:
    """Check an imatrix against the model, on shapes and coverage, and wrap it; ImatrixError where it does not fit."""
    check_imatrix(imatrix, config)
    return ModelImportance(imatrix, config, coverage(imatrix, config))


def repair(mean_squares: NDArray[np.float32], counts: F64, where: str) -> tuple[F64, F64, list[str]]:
    """Usable E[x²] f64 [experts, K] and tokens f64 [experts] of one projection, and sentences on what was replaced.

    Entries that are negative or not finite take the layer's mean of that channel over healthy experts; experts are
    then shrunk toward that mean by their counts, so that one without tokens takes it whole. A channel that no expert
    has data for takes the mean channel.
    """
    d = mean_squares.astype(np.float64)
    n = np.where(np.isfinite(counts) & (counts > 0), counts, 0.0)
    broken = ~np.isfinite(d) | (d < 0)
    broken[n == 0] = False
    healthy = ~broken & (n > 0)[:, None]
    d = np.where(healthy, d, 0.0)
    mass = np.where(healthy, n[:, None], 0.0)
    seen = mass.sum(axis=0)
    shared = (d * mass).sum(axis=0) / np.where(seen > 0, seen, 1.0)
    if not (shared > 0).any():
        raise ImatrixError(f"{where} has no usable value", hint="gather the imatrix again on more text")
    shared = np.where(seen > 0, shared, shared[seen > 0].mean())
    d = np.where(healthy, d, shared)
    shrunk = (n[:, None] * d + KAPPA * shared) / (n[:, None] + KAPPA)
    notes = []
    if broken.any():
        experts = np.flatnonzero(broken.any(axis=1))
        named = ", ".join(map(str, experts[:8])) + (", …" if len(experts) > 8 else "")
        notes.append(
            f"{where}: {int(broken.sum())} non-finite or negative entries of experts {named} took the layer's mean"
        )
    if (n == 0).any():
        notes.append(f"{where}: {int((n == 0).sum())} experts without tokens took the layer's mean")
    return shrunk, n, notes
