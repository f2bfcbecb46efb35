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

from ...awq.importance import LayerImportance, LayerWithRows
from ...formats.blocks import BY_NAME
from ...formats.minimax import ModelConfig, expert_name
from ...verify.model.reference import Weights
from ..encode.answering import answering_down, product
from ..encode.encoders import CPU, Encoder
from ..encode.layer_encoder import LayerEncoder
from ..encode.once import Once, Together
from ..encode.prepared_layer import FitSettings

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


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
    """One layer's experts under several choices of formats; `kind` encodes them."""

    kind: type[LayerEncoder] = LayerEncoder

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
        self.encoder = encoder
        used = dict.fromkeys(f for choice in self.choices for f in choice if f is not None)
        pairs = [*(Choice(f, f) for f in used), *(c for c in self.choices if c.gate_up and c.down)]
        self._encoders: dict[Choice, LayerEncoder] = {}
        once = Together()
        for pair in dict.fromkeys(pairs):
            above, below = BY_NAME[str(pair.gate_up)], BY_NAME[str(pair.down)]
            made = self.kind(
                config, layer, importance, {"w1": above, "w2": below, "w3": above}, settings, encoder
            )
            made.prepare({needed: source.weight(needed) for needed in made.needs_samples()}, once)
            self._encoders[pair] = made

    def expert(self, expert: int) -> dict[Choice, Matrices]:
        """One expert under each choice, and as the source has it; for any number of threads."""
        plain, once = self.plain(expert), Together()
        whole = {
            pair: decoded(made, made.encode_expert(expert, *plain, once).payloads, plain, once)
            for pair, made in self._encoders.items()
        }
        importance = self.importance
        inputs = importance.inputs(expert) if isinstance(importance, LayerWithRows) else None
        there = None if inputs is None else product(inputs, plain.w1, plain.w3)
        out = {SOURCE: plain}
        for choice in self.choices:
            if choice.gate_up is None and choice.down is not None:
                below = self._down(choice.down, expert, plain.w2, there, whole)
                out[choice] = plain._replace(w2=below)
            elif choice.down is None and choice.gate_up is not None:
                above = whole[Choice(choice.gate_up, choice.gate_up)]
                out[choice] = above._replace(w2=_answer(plain.w2, above, inputs, there))
            elif choice != SOURCE:
                out[choice] = whole[choice]
        return out

    def plain(self, expert: int) -> Matrices:
        """One expert as the source has it."""
        return Matrices(*(self.source.weight(expert_name(self.layer, expert, p)) for p in ("w1", "w3", "w2")))

    def _down(
        self, name: str, expert: int, w2: F32, seen: F32 | None, whole: Mapping[Choice, Matrices]
    ) -> F32:
        """Down alone in a format; where no inputs were kept it does not depend on gate and up."""
        if seen is None:
            return whole[Choice(name, name)].w2
        encoder = self._encoders[Choice(name, name)]
        return encoder.stored.form("w2").decode(encoder.encode_down(expert, w2, seen), w2.shape)


def decoded(encoder: LayerEncoder, payloads: Mapping[str, U8], plain: Matrices, once: Once) -> Matrices:
    """An expert as a build has it. A payload that several encoders have in common, whose stored form is one then, is
    decoded once.
    """

    def matrix(p: str) -> F32:
        payload, shape = payloads[p], getattr(plain, p).shape
        return once.one(("decoded", id(payload)), lambda: encoder.stored.form(p).decode(payload, shape))

    return Matrices(matrix("w1"), matrix("w3"), matrix("w2"))


def _answer(w2: F32, above: Matrices, inputs: F32 | None, there: F32 | None) -> F32:
    """Down, fitted to rounded gate and up where their inputs f32 [n, hidden] were kept, but not rounded."""
    if inputs is None or there is None:
        return w2
    return answering_down(w2, there, product(inputs, above.w1, above.w3))


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
