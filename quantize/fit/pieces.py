"""The experts of one layer as rounding leaves them: gate and up alone, down alone, and both.

Each is what a build has. Where experts' inputs were kept, a build fits down to what the rounded gate and up really give
it, which takes back much of their loss; so that losses add up, the fit belongs to the piece of gate and up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...awq.importance import LayerImportance
from ...formats.blocks import BY_NAME, Format
from ...formats.minimax import PROJECTIONS, ModelConfig, expert_name
from ...verify.model.reference import Weights
from ..encode.answering import answering_down, product
from ..encode.encoders import CPU, Encoder
from ..encode.layer_encoder import FitSettings, LayerEncoder

F32 = NDArray[np.float32]


class Choice(NamedTuple):
    """The formats of gate and up and of down, by name; None where they stay as the source has them."""

    gate_up: str | None
    down: str | None


SOURCE = Choice(None, None)


class Matrices(NamedTuple):
    """One expert's matrices f32: w1 and w3 [intermediate, hidden], w2 [hidden, intermediate]."""

    w1: F32
    w3: F32
    w2: F32


class LayerPieces:
    """One layer's experts under several choices of formats."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        importance: LayerImportance,
        choices: Sequence[Choice],
        settings: FitSettings,
        source: Weights,
        encoder: Encoder = CPU,
    ) -> None:
        """Chooses each format's AWQ scale from a few of the source's matrices."""
        self.layer, self.importance, self.choices, self.source = layer, importance, tuple(choices), source
        self._encoders: dict[str, LayerEncoder] = {}
        for name in dict.fromkeys(f for choice in self.choices for f in choice if f is not None):
            formats: dict[str, Format] = dict.fromkeys(PROJECTIONS, BY_NAME[name])
            made = LayerEncoder(config, layer, importance, formats, settings, encoder)
            made.prepare({needed: source.weight(needed) for needed in made.needs_samples()})
            self._encoders[name] = made

    def expert(self, expert: int) -> dict[Choice, Matrices]:
        """One expert under each choice, and as the source has it; for any number of threads."""
        plain = Matrices(
            *(self.source.weight(expert_name(self.layer, expert, p)) for p in ("w1", "w3", "w2"))
        )
        whole = {name: self._rounded(name, expert, plain) for name in self._encoders}
        inputs = self.importance.inputs(expert)
        if inputs is None:
            made = {choice: _put_together(plain, whole, choice) for choice in self.choices}
        else:
            made = self._answering(expert, plain, whole, inputs)
        return {SOURCE: plain, **made}

    def _rounded(self, name: str, expert: int, plain: Matrices) -> Matrices:
        """The expert as a build in one format has it."""
        encoder = self._encoders[name]
        done = encoder.encode_expert(expert, *plain).payloads
        w1, w3, w2 = (
            encoder.stored.form(p).decode(done[p], getattr(plain, p).shape) for p in ("w1", "w3", "w2")
        )
        return Matrices(w1, w3, w2)

    def _answering(
        self, expert: int, plain: Matrices, whole: Mapping[str, Matrices], inputs: F32
    ) -> dict[Choice, Matrices]:
        """The expert under each choice, where down is fitted to what the rounded gate and up give it."""
        there = product(inputs, plain.w1, plain.w3)
        above: dict[str | None, tuple[Matrices, F32]] = {None: (plain, there)}
        for name in dict.fromkeys(c.gate_up for c in self.choices if c.gate_up is not None):
            here = product(inputs, whole[name].w1, whole[name].w3)
            above[name] = whole[name]._replace(w2=answering_down(plain.w2, there, here)), here
        out = {}
        for choice in self.choices:
            given, seen = above[choice.gate_up]
            if choice.down is None:
                out[choice] = given
            elif choice.down == choice.gate_up:
                out[choice] = whole[choice.down]
            else:
                encoder = self._encoders[choice.down]
                payload = encoder.encode_down(expert, given.w2, seen)
                out[choice] = given._replace(w2=encoder.stored.form("w2").decode(payload, given.w2.shape))
        return out


def _put_together(plain: Matrices, whole: Mapping[str, Matrices], choice: Choice) -> Matrices:
    """An expert whose matrices are rounded without looking at each other."""
    above = plain if choice.gate_up is None else whole[choice.gate_up]
    below = plain if choice.down is None else whole[choice.down]
    return above._replace(w2=below.w2)


def in_order(
    pieces: LayerPieces, experts: Sequence[int], jobs: int
) -> Iterator[tuple[int, dict[Choice, Matrices]]]:
    """Some experts of a layer, one after the other, rounded ahead on a pool of threads; few are held at a time."""
    waiting, coming = deque(experts), deque[tuple[int, Future[dict[Choice, Matrices]]]]()
    with ThreadPoolExecutor(jobs, thread_name_prefix="round") as pool:
        try:
            while waiting or coming:
                while waiting and len(coming) <= jobs:
                    expert = waiting.popleft()
                    coming.append((expert, pool.submit(pieces.expert, expert)))
                ready, future = coming.popleft()
                yield ready, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
