"""A reference of which every token's logit is at hand: the source while it runs, or a file of all log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model.metrics import TOP, Positions, joined, shared
from .running import Running


@dataclass(frozen=True)
class Sums:
    """How a reference's numbers become figures. `floor` is the log-probability from which on a token counts.

    `kld` takes Σ p·(a − b) / Σ p, ln Σ exp(a) and ln Σ exp(b), f64 [n] each, `nll` what the last but one is and the
    logits of the tokens that follow.
    """

    kld: Callable[[Tensor, Tensor, Tensor], Tensor]
    nll: Callable[[Tensor, Tensor], Tensor]
    floor: float = -math.inf


NORMALISED = Sums(lambda mean, a, b: (mean - a + b).clamp_min(0), lambda total, target: total - target)
"""Of logits, or log-probabilities whose sum is not quite one: both distributions are normalised."""


class DenseLogits(Protocol):
    """Where the reference's logits, or log-probabilities, come from."""

    def load(self, low: int, high: int) -> None: ...
    def logits(self, sequence: int, scored: range) -> Tensor: ...


@dataclass
class _Sequence:
    reference: Running
    tests: list[Running]
    means: list[Tensor]


@dataclass
class DenseComparison:
    """Token ids [n_seq, len] of which the positions in `scored` are judged."""

    source: DenseLogits
    tokens: NDArray[np.integer]
    vocabulary: int
    models: int
    scored: range
    sums: Sums = NORMALISED
    _state: list[_Sequence] = field(init=False)

    def __post_init__(self) -> None:
        ids = torch.from_numpy(np.asarray(self.tokens, np.int64))
        count, top = len(self.scored), min(TOP, self.vocabulary)
        self._state = []
        for sequence in ids:
            following = sequence[self.scored.start + 1 : self.scored.stop + 1]
            self._state.append(
                _Sequence(
                    Running(following, count, top, self.sums.floor),
                    [Running(following, count, top) for _ in range(self.models)],
                    [torch.zeros(count, dtype=torch.float64) for _ in range(self.models)],
                )
            )

    @property
    def sequences(self) -> int:
        return len(self._state)

    @property
    def totals(self) -> list[Tensor]:
        """ln Σ exp(logit) f64 [positions] of the reference, sequence by sequence."""
        return [state.reference.total for state in self._state]

    def begin(self, low: int, high: int) -> None:
        self.source.load(low, high)

    def take(self, sequence: int, low: int, tests: Sequence[Tensor]) -> None:
        state = self._state[sequence]
        reference = self.source.logits(sequence, self.scored)
        before = state.reference.total
        state.reference.take(low, reference)
        total = state.reference.total
        share = torch.where(before == -torch.inf, 0.0, (before - total).exp())
        weights = torch.where(reference <= self.sums.floor, 0.0, (reference - total[:, None]).exp())
        for i, (running, test) in enumerate(zip(state.tests, tests, strict=True)):
            running.take(low, test)
            apart = torch.where(weights > 0, reference - test, 0.0)  # 0 · ∞ is 0 here
            state.means[i] = state.means[i] * share + (weights * apart).sum(-1)

    def finish(self) -> list[Positions]:
        return [joined([self._positions(state, i) for state in self._state]) for i in range(self.models)]

    def _positions(self, state: _Sequence, model: int) -> Positions:
        theirs, ours = state.reference, state.tests[model]
        kld = self.sums.kld(state.means[model], theirs.total, ours.total)
        return Positions(
            kld.numpy(),
            (theirs.first == ours.first).numpy(),
            shared(theirs.ids, ours.ids),
            self.sums.nll(theirs.total[: len(theirs.target)], theirs.target).numpy(),
            (ours.total[: len(ours.target)] - ours.target).numpy(),
        )


def of_source(
    source: DenseLogits, tokens: NDArray[np.integer], vocabulary: int, models: int
) -> DenseComparison:
    """The source that runs beside the models, or what was saved of it: every position is judged."""
    return DenseComparison(source, tokens, vocabulary, models, range(tokens.shape[1]))
