"""Importances from an imatrix: E[x²] of every channel, repaired where it is unusable, shrunk where it is uncertain.

Shrinkage toward the layer and the repair of broken entries happen here and nowhere else; each replacement is put into
words. All arithmetic is f64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ImatrixError
from ..formats.minimax import PROJECTIONS, ModelConfig
from ..formats.statistics.imatrix import Imatrix, check_imatrix, coverage, expert_entry
from .importance import F64, Importance, summed_energy

IMATRIX_PRIOR = 32.0
"""κ: the tokens that the layer's mean is worth. An expert seen n times keeps n / (n + κ) of its own statistics."""
SHOWN_EXPERTS = 8
"""Experts that a note names."""


@dataclass(frozen=True)
class ImatrixLayer:
    """One layer: E[x²] f64 [experts, K] and tokens f64 [experts] per projection, repaired and shrunk."""

    layer: int
    diagonals: dict[str, F64]
    counts: dict[str, F64]
    notes: tuple[str, ...]

    def of(self, expert: int, projection: str) -> Importance:
        """The importance of one matrix, without a moment."""
        return Importance(self.diagonals[projection][expert], count=float(self.counts[projection][expert]))

    @property
    def shared(self) -> None:
        """An imatrix knows no moment."""

    def gate_up_energy(self) -> F64:
        """Σ over experts of the summed squares at gate and up, f64 [hidden]."""
        return summed_energy(self.diagonals, self.counts)


@dataclass(frozen=True)
class ImatrixModel:
    """The importances of a model, read layer by layer; `coverage` is the share of experts with data."""

    imatrix: Imatrix
    config: ModelConfig
    coverage: float

    def layer(self, layer: int) -> ImatrixLayer:
        """One layer's importances; ImatrixError where a projection has no usable value at all."""
        diagonals, counts, notes = {}, {}, []
        for projection in PROJECTIONS:
            entry = expert_entry(self.imatrix, layer, projection, self.config.num_local_experts)
            assert entry is not None
            diagonals[projection], counts[projection], found = repair(
                entry.sum2_mean, entry.counts, f"layer {layer} {projection}"
            )
            notes += found
        return ImatrixLayer(layer, diagonals, counts, tuple(notes))

    def record(self) -> dict[str, Any]:
        """What a file that is made with it says of it."""
        return {
            "sha256": self.imatrix.sha256,
            "kind": self.imatrix.kind,
            "datasets": list(self.imatrix.datasets),
            "chunk_count": self.imatrix.chunk_count,
            "coverage": self.coverage,
        }


def load_importance(imatrix: Imatrix, config: ModelConfig) -> ImatrixModel:
    """Check an imatrix against the model, on shapes and coverage, and wrap it; ImatrixError where it does not fit."""
    check_imatrix(imatrix, config)
    return ImatrixModel(imatrix, config, coverage(imatrix, config))


def repair(mean_squares: NDArray[np.float32], counts: F64, where: str) -> tuple[F64, F64, list[str]]:
    """Usable E[x²] f64 [experts, K] and tokens f64 [experts] of one projection, and sentences on what was replaced.

    Entries that are negative or not finite take the layer's mean of that channel over healthy experts. Experts are then
    shrunk toward that mean by their counts, so that an expert without tokens takes the mean itself. A channel of which
    no expert has data takes the mean over channels. ImatrixError where nothing is usable.
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
    shrunk = (n[:, None] * d + IMATRIX_PRIOR * shared) / (n[:, None] + IMATRIX_PRIOR)
    notes = []
    if broken.any():
        experts = np.flatnonzero(broken.any(axis=1))
        named = ", ".join(map(str, experts[:SHOWN_EXPERTS])) + (", …" if len(experts) > SHOWN_EXPERTS else "")
        notes.append(
            f"{where}: {int(broken.sum())} non-finite or negative entries of experts {named} took the layer's mean"
        )
    if (n == 0).any():
        notes.append(f"{where}: {int((n == 0).sum())} experts without tokens took the layer's mean")
    return shrunk, n, notes
