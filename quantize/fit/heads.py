"""The last step of a measurement: how far the predictions behind each stream are from those of the source."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import CheckError
from ...verify.evaluate.dense import of_source
from ...verify.evaluate.head import Head, judge
from ...verify.model.layer_model import Logits, TorchModel
from ..evaluate.layers import Mapped
from .streams import START, StreamsRun

TOGETHER = 8
"""Streams whose predictions are in memory at once."""


@dataclass
class SharedHead:
    """The head of a model for many streams: the rows of the vocabulary that were loaded last are not read again."""

    model: TorchModel
    _last: tuple[tuple[int, int], Logits] | None = field(default=None, init=False)

    def head(self, low: int, high: int) -> Logits:
        """As `LayerModel.head`."""
        if self._last is None or self._last[0] != (low, high):
            self._last = (low, high), self.model.head(low, high)
        return self._last[1]


def divergences(run: StreamsRun) -> dict[str, NDArray[np.float64]]:
    """The KLD f64 [positions], in nats, of every stream but the source's, when all have passed the last layer.

    Raises CheckError where predictions are not numbers.
    """
    config, count = run.plan.config, run.plan.config.num_hidden_layers
    exact, stored = (SharedHead(TorchModel(w, config, run.device)) for w in (run.source, run.rest))

    def head(name: str) -> Head:
        stream = Mapped(run.streams.mapped(name, count))
        return Head(exact if name == START else stored, stream)

    names = [name for name in run.streams.hashes(count) if name != START]
    found: dict[str, NDArray[np.float64]] = {}
    groups = [names[low : low + TOGETHER] for low in range(0, len(names), TOGETHER)]
    run.watch.begin("next tokens", len(groups) * config.vocab_size, "tokens")
    for group in groups:
        comparison = of_source(head(START), run.tokens, config.vocab_size, len(group))
        for name, positions in zip(group, judge(comparison, [head(n) for n in group]), strict=True):
            found[name] = positions.kld
            if not np.isfinite(positions.kld).all():
                raise CheckError(
                    f"the predictions behind the stream {name} are not numbers",
                    hint="`mq-quant verify` on a file of this source says more",
                )
        run.watch.advance(config.vocab_size)
    return found
