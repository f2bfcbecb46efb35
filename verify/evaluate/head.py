"""The last step of an evaluation: every model's logits against the reference's, some rows of the vocabulary at a time.

Each part of a vocabulary's matrix is read once and used for all positions. Memory holds one part of each model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...formats.watch import UNWATCHED, Watch
from ..model.layer_model import Logits
from ..model.metrics import Positions
from . import HEAD_ROWS

ROWS = HEAD_ROWS


class Comparison(Protocol):
    """A reference, and how far each of several models is from it. Parts of the vocabulary come in ascending order."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def scored(self) -> range:
        """The positions of a sequence that are judged."""
        ...

    def begin(self, low: int, high: int) -> None:
        """The next rows of the vocabulary: all sequences are taken before the next ones begin."""
        ...

    def take(self, sequence: int, low: int, tests: Sequence[Tensor]) -> None:
        """Each model's logits f64 [positions, high - low] of one sequence."""
        ...

    def finish(self) -> list[Positions]:
        """What was found of each model, once the whole vocabulary has been taken."""
        ...


class Headed(Protocol):
    """A model's head; every `LayerModel` has one."""

    def head(self, low: int, high: int) -> Logits:
        """Load rows low to high of the vocabulary's matrix."""
        ...


class Stream(Protocol):
    """Final hidden states, a sequence f32 [len, H] at a time."""

    def __getitem__(self, sequence: int, /) -> Tensor: ...


@dataclass
class Head:
    """A model and the stream behind its last layer, of which any sequence f32 [len, H] can be asked for."""

    model: Headed
    stream: Stream

    def load(self, low: int, high: int) -> None:
        self._rows: Logits = self.model.head(low, high)

    def logits(self, sequence: int, scored: range) -> Tensor:
        """Logits f64 [positions, rows] of the rows that were loaded."""
        return self._rows(self.stream[sequence][scored.start : scored.stop]).double()


def judge(comparison: Comparison, heads: Sequence[Head], watch: Watch = UNWATCHED) -> list[Positions]:
    """Compare the models with the reference; `watch` hears of the tokens of the vocabulary."""
    watch.begin("next tokens", comparison.vocabulary, "tokens")
    for low in range(0, comparison.vocabulary, ROWS):
        high = min(low + ROWS, comparison.vocabulary)
        comparison.begin(low, high)
        for head in heads:
            head.load(low, high)
        with torch.inference_mode():
            for sequence in range(comparison.sequences):
                comparison.take(sequence, low, [head.logits(sequence, comparison.scored) for head in heads])
        watch.advance(high - low)
    return comparison.finish()
