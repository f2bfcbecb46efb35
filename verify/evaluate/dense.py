"""A reference of which every token's logit is at hand: the source while it runs, or a file of all log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model.metrics import TOP, Positions, joined, shared
from .head import Head
from .running import Running

Value = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From Σ p·(a − b) / Σ p, ln Σ exp(a) and ln Σ exp(b), f64 [n] each, to the KLD f64 [n]."""


class DenseLogits(Protocol):
    """Where the reference's logits, or log-probabilities, come from."""

    def load(self, low: int, high: int) -> None: ...
    def logits(self, sequence: int, scored: range) -> Tensor: ...


def normalised(mean: Tensor, reference: Tensor, test: Tensor) -> Tensor:
    """The KLD of two distributions of which logits are known."""
    return mean - reference + test


@dataclass
class _Sequence:
    reference: Running
    tests: list[Running]
    means: list[Tensor]


@dataclass
class DenseComparison:
    """Token ids [n_seq, len] of which the positions in `scored` are judged; `kept` of the reference's most likely
    tokens are remembered.
    """

    source: DenseLogits
    tokens: NDArray[np.integer]
    vocabulary: int
    models: int
    scored: range
    kept: int = TOP
    value: Value = normalised
    _state: list[_Sequence] = field(init=False)

    def __post_init__(self) -> None:
        ids = torch.from_numpy(np.asarray(self.tokens, np.int64))
        count, top = len(self.scored), min(TOP, self.vocabulary)
        self._state = []
        for sequence in ids:
            following = sequence[self.scored.start + 1 : self.scored.stop + 1]
            self._state.append(
                _Sequence(
                    Running(following, count, max(top, min(self.kept, self.vocabulary))),
                    [Running(following, count, top) for _ in range(self.models)],
                    [torch.zeros(count, dtype=torch.float64) for _ in range(self.models)],
                )
            )

    @property
    def sequences(self) -> int:
        return len(self._state)

    @property
    def references(self) -> list[Running]:
        """What is known of the reference, sequence by sequence."""
        return [state.reference for state in self._state]

    def begin(self, low: int, high: int) -> None:
        self.source.load(low, high)

    def take(self, sequence: int, low: int, tests: Sequence[Tensor]) -> None:
        state = self._state[sequence]
        reference = self.source.logits(sequence, self.scored)
        before = state.reference.total
        state.reference.take(low, reference)
        total = state.reference.total
        share = torch.where(before == -torch.inf, 0.0, (before - total).exp())
        weights = torch.where(reference == -torch.inf, 0.0, (reference - total[:, None]).exp())
        for i, (running, test) in enumerate(zip(state.tests, tests, strict=True)):
            running.take(low, test)
            apart = torch.where(weights > 0, reference - test, 0.0)  # 0 · ∞ is 0 here
            state.means[i] = state.means[i] * share + (weights * apart).sum(-1)

    def finish(self) -> list[Positions]:
        return [joined([self._positions(state, i) for state in self._state]) for i in range(self.models)]

    def _positions(self, state: _Sequence, model: int) -> Positions:
        theirs, ours = state.reference, state.tests[model]
        kld = self.value(state.means[model], theirs.total, ours.total).clamp_min(0)
        return Positions(
            kld.numpy(),
            (theirs.first == ours.first).numpy(),
            shared(theirs.ids[:, : ours.ids.shape[1]], ours.ids),
            theirs.nll.numpy(),
            ours.nll.numpy(),
        )


def of_source(
    source: Head, tokens: NDArray[np.integer], vocabulary: int, models: int, kept: int = TOP
) -> DenseComparison:
    """The source that runs beside the models: every position is judged."""
    return DenseComparison(source, tokens, vocabulary, models, range(tokens.shape[1]), kept)
