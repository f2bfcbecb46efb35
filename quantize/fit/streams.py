"""All residual streams of a measurement go through a layer together: one for each model that differs from the source.

`source` is the source itself. `rest` has everything but the experts as a file stores it, `whole0`, `whole1`, … the
experts besides. `piece0`, `piece1`, … have one piece rounded besides the rest; they leave the stream of the rest at the
layer of that piece. Streams lie on the disk between layers, and memory holds a few of them.

Pieces are not compared with the bare source, since the smallest error makes some tokens take other experts. That costs
once, not once for each piece; with the rest stored, it is paid already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ...formats.checkpoint.source import Source
from ...formats.minimax import ModelConfig
from ...formats.watch import Watch
from ...verify.model.reference import (
    Routing,
    TensorWeights,
    Weights,
    add_expert,
    before_experts,
    choices_by_expert,
    embed,
    layer_forward,
)
from ..calibrate.layer_pass import layer_weights
from ..calibrate.tokens import Tokens
from ..spec.calibration_sizes import stream_group
from ..write.layer_streams import LayerStreams
from .pieces import SOURCE, Choice, LayerPieces, Matrices, in_order
from .rest import RestLayer, RestWeights

START = "source"
REST = "rest"


@dataclass(frozen=True)
class Streams:
    """What is measured: `formats` of each piece, and `wholes`, the formats of whole models layer by layer."""

    config: ModelConfig
    formats: tuple[str, ...]
    wholes: tuple[tuple[Choice, ...], ...]

    @property
    def begun(self) -> tuple[str, ...]:
        """The streams that enter the first layer."""
        return START, REST, *(f"whole{i}" for i in range(len(self.wholes)))

    def pieces(self, layer: int) -> dict[str, Choice]:
        """The streams that leave that of the rest at a layer, with what is rounded there."""
        kinds = [Choice(f, None) for f in self.formats] + [Choice(None, f) for f in self.formats]
        return {f"piece{len(kinds) * layer + i}": kind for i, kind in enumerate(kinds)}

    def entering(self, layer: int) -> tuple[str, ...]:
        """All streams that enter a layer."""
        return (*self.begun, *(name for n in range(layer) for name in self.pieces(n)))

    def choices(self, layer: int) -> tuple[Choice, ...]:
        """Everything that is rounded at a layer."""
        return (*dict.fromkeys((*self.pieces(layer).values(), *(whole[layer] for whole in self.wholes))),)


@dataclass(frozen=True)
class Entered:
    """A stream on its way through a layer, in front of its experts: f32 [n_seq, len, H], what they see of it f32
    [n, H], and which of them each token takes; `taken` says where in the routing's ids an expert stands.
    """

    hidden: Tensor
    inputs: Tensor
    routing: Routing
    taken: Mapping[int, Tensor]

    @classmethod
    def of(cls, weights: Weights | TensorWeights, config: ModelConfig, layer: int, hidden: Tensor) -> Entered:
        """A stream f32 [n_seq, len, H] that enters a layer."""
        before, inputs, routing = before_experts(weights, config, layer, hidden)
        return cls(before, inputs, routing, dict(choices_by_expert(routing.ids, config.num_local_experts)))


@dataclass(frozen=True)
class StreamsRun:
    """The streams of a plan on their way through the layers."""

    source: Source
    rest: RestWeights
    plan: Streams
    tokens: Tokens
    device: torch.device
    streams: LayerStreams
    watch: Watch

    def pass_layer(self, layer: int, pieces: LayerPieces, jobs: int) -> None:
        """Take every stream through a layer, and make what is behind it durable."""
        saved: dict[str, str] = {}
        with torch.inference_mode(), layer_weights(self.source, (self.device,), layer) as weights:
            for name, behind in self._rounded(layer, weights, pieces, jobs):
                saved[name] = self.streams.folder.save(name, layer + 1, behind.cpu().numpy())
            for name, behind in self._later(layer, RestLayer(self.rest, weights, self.device)):
                saved[name] = self.streams.folder.save(name, layer + 1, behind.cpu().numpy())
        self.rest.forget()
        self.streams.end_layer(layer, saved)

    def _enter(self, name: str, layer: int) -> Tensor:
        if layer == 0:
            return embed(self.source if name == START else self.rest, self.tokens)
        return torch.from_numpy(self.streams.load(name, layer))

    def _rounded(
        self, layer: int, weights: Weights | TensorWeights, pieces: LayerPieces, jobs: int
    ) -> Iterator[tuple[str, Tensor]]:
        """What is behind the layer, by the name of its stream, where experts of this layer are rounded, and of the
        streams from which these depart.
        """
        config = self.plan.config
        entered = {
            name: Entered.of(
                weights if name == START else self.rest,
                config,
                layer,
                self._enter(name, layer).to(self.device),
            )
            for name in self.plan.begun
        }
        kinds = {
            START: SOURCE,
            REST: SOURCE,
            **{f"whole{i}": whole[layer] for i, whole in enumerate(self.plan.wholes)},
        }
        of = {name: (kind, entered[name]) for name, kind in kinds.items()}
        of |= {name: (kind, entered[REST]) for name, kind in self.plan.pieces(layer).items()}
        outs = {name: torch.zeros_like(before.inputs) for name, (_, before) in of.items()}
        needed = sorted({expert for before in entered.values() for expert in before.taken})
        for expert, made in in_order(pieces, needed, jobs):
            there = self._there(made)
            for name, (kind, before) in of.items():
                if expert in before.taken:
                    add_expert(outs[name], there[kind], before.inputs, before.routing, before.taken[expert])
            self.watch.advance(weights_of_expert(config), f"layer {layer} expert {expert}")
        self.watch.advance(
            (config.num_local_experts - len(needed)) * weights_of_expert(config), f"layer {layer}"
        )
        for name, (_, before) in of.items():
            yield name, before.hidden + outs.pop(name).view_as(before.hidden)

    def _later(self, layer: int, weights: TensorWeights) -> Iterator[tuple[str, Tensor]]:
        """What is behind the layer of the pieces of earlier layers, a few streams at a time."""
        names = [name for name in self.plan.entering(layer) if name not in self.plan.begun]
        at_once = stream_group(self.plan.config, int(self.tokens.size))
        for low in range(0, len(names), at_once):
            group = names[low : low + at_once]
            hidden = torch.cat([self._enter(name, layer) for name in group]).to(self.device)
            behind = layer_forward(weights, self.plan.config, layer, hidden)
            yield from zip(group, behind.chunk(len(group)), strict=True)
            self.watch.advance(
                0, f"layer {layer}, {low + len(group)} of {len(names)} pieces of earlier layers"
            )

    def _there(self, made: Mapping[Choice, Matrices]) -> dict[Choice, tuple[Tensor, Tensor, Tensor]]:
        """An expert under each choice, on the device; what several choices have in common goes there once."""
        sent: dict[int, Tensor] = {}
        for matrix in chain.from_iterable(made.values()):
            if id(matrix) not in sent:
                writable = np.require(matrix, requirements=["C", "W"])
                sent[id(matrix)] = torch.from_numpy(writable).to(self.device)
        return {choice: (sent[id(w1)], sent[id(w3)], sent[id(w2)]) for choice, (w1, w3, w2) in made.items()}


def weights_of_expert(config: ModelConfig) -> int:
    """Weights of one expert."""
    return 3 * config.hidden_size * config.intermediate_size
