"""What is known of the inputs of every expert matrix: one object, whatever statistics it came from.

`from_imatrix` and `from_moments` read the statistics and repair them; what they make follows the protocols below.
Damping, tempering, scale and rotation are applied here and nowhere else. All arithmetic is f64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..formats.fwht import rotate_columns, rotate_rows
from .row_answers import RowAnswers

F64 = NDArray[np.float64]

TEMPER = 0.75
"""Where only E[x²] is known, a channel weighs E[x²]^0.75. With 1, the few tokens with huge activations decide; KLD
counts every token alike. Measured: README, Quality."""
DAMPING = 0.05
"""Share of the mean weight that every channel gets."""
STRIP = 16
"""Rows of a moment that are damped, scaled and rotated at a time, while they lie in a core's own cache."""


@dataclass(frozen=True)
class Importance:
    """What is known of the inputs of one matrix: diagonal E[x²] f64 [K], and moment E[x xᵀ] f64 [K, K] where it was
    gathered.

    `count` is the number of tokens behind it, `damping` the share of the mean energy that every channel of the moment
    gets before it is factored. Nothing here is damped, scaled or rotated yet.
    """

    diagonal: F64
    moment: F64 | None = None
    count: float = 0.0
    damping: float = DAMPING

    def channel_weights(
        self, scale: NDArray[np.float32] | None = None, damping: float = DAMPING, temper: float = TEMPER
    ) -> F64:
        """Tempered and damped E[x²] f64 [K], for inputs divided by the AWQ scale s f32 [K]."""
        d = self.diagonal**temper
        d = (1 - damping) * d + damping * d.mean()
        if scale is not None:
            d = d / np.square(scale.astype(np.float64))
        return np.asarray(d, np.float64)

    def rotated_moment(
        self, scale: NDArray[np.float32] | None = None, damping: float | None = None, room: F64 | None = None
    ) -> F64:
        """The damped second moment f64 [K, K] of R·(x/s), where R rotates each group of 256 and s f32 [K] is the scale;
        in `room`, which may be that of the moment itself.

        Where no moment was gathered it is that of `channel_weights`. A moment is not tempered: that loses more in its
        small eigenvalues than it gains.
        """
        share = self.damping if damping is None else damping
        if self.moment is None:
            given, kept, added = np.diag(self.channel_weights(damping=share)), 1.0, 0.0
        else:
            given, kept, added = self.moment, 1 - share, share * self.diagonal.mean()
        inverse = np.ones(len(given)) if scale is None else 1.0 / scale.astype(np.float64)
        full = square(len(given), room)
        for start in range(0, len(full), STRIP):
            rows = slice(start, start + STRIP)
            strip = np.multiply(given[rows], kept, out=full[rows])
            strip[:, rows][np.diag_indices(len(strip))] += added
            strip *= inverse[rows, None]
            strip *= inverse
            rotate_rows(strip)
        rotate_columns(full)
        return full


def square(width: int, room: F64 | None = None) -> F64:
    """An f64 [width, width], not yet filled: the beginning of `room` f64 [n], or new memory."""
    return np.empty((width, width)) if room is None else room[: width * width].reshape(width, width)


@runtime_checkable
class LayerImportance(Protocol):
    """The importances of one layer's experts, for any number of threads."""

    @property
    def layer(self) -> int:
        """The layer's number."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what could not be used and was replaced."""
        ...

    @property
    def shared(self) -> Importance | None:
        """The importance of the inputs that w1 and w3 of all experts see, where a moment of them was gathered."""
        ...

    def of(self, expert: int, projection: str) -> Importance:
        """The importance of one matrix."""
        ...

    def gate_up_energy(self) -> F64:
        """Σ over experts of the summed squares at gate and up, f64 [hidden]: what the shared AWQ scale follows."""
        ...


@runtime_checkable
class LayerWithRows(LayerImportance, Protocol):
    """The same of a layer whose experts' inputs were kept, so that each of them has moments of its own."""

    @property
    def answers(self) -> RowAnswers | None:
        """How rows of down answer each other, None where they do not."""
        ...

    def inputs(self, expert: int) -> NDArray[np.float32]:
        """The rows f32 [n, hidden] that one expert's gate and up see."""
        ...

    def from_rows(
        self,
        expert: int,
        projection: str,
        rows: NDArray[np.float32],
        sums: NDArray[Any] | None = None,
        room: F64 | None = None,
    ) -> Importance:
        """The importance of one matrix whose inputs are these rows f32 [n, K].

        `sums` [K, K], whose lower triangle counts, are the sums of rowsᵀ · rows, where the caller has them. Its moment
        may lie in `room` f64 [K² or more].
        """
        ...


class ModelImportance(Protocol):
    """The importances of a model, read layer by layer."""

    @property
    def coverage(self) -> float:
        """Share of experts that saw a token."""
        ...

    def layer(self, layer: int) -> LayerImportance:
        """One layer's importances; ImatrixError or CalibrationError where nothing of them can be used."""
        ...

    def record(self) -> dict[str, Any]:
        """What a file that is made with it says of it."""
        ...


def summed_energy(diagonals: Mapping[str, F64], counts: Mapping[str, F64]) -> F64:
    """`LayerImportance.gate_up_energy` from E[x²] f64 [experts, hidden] and tokens f64 [experts] of w1 and w3."""
    total = np.zeros(diagonals["w1"].shape[1])
    for projection in ("w1", "w3"):
        total += (diagonals[projection] * counts[projection][:, None]).sum(axis=0)
    return total
