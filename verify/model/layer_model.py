"""A model that is run one layer at a time: the source in torch, a decoded file in torch, or a file by our kernels.

Whoever compares models takes all of them through a layer before the next one is read. Streams f32 [n_seq, len, H] are
the caller's: a model keeps nothing between two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...formats.minimax import ModelConfig
from .kernel_forward import KernelModel
from .reference import Observer, Routing, RowWeights, Weights, embed, layer_forward, load, rms_norm

CPU = torch.device("cpu")
Logits = Callable[[Tensor], Tensor]
"""From final hidden states f32 [m, H] to logits f32 [m, rows] of some rows of the vocabulary."""


@dataclass(frozen=True)
class Behind:
    """What a layer leaves behind: the stream f32 [n_seq, len, H], and the expert ids i64 [n_seq · len, k] it chose."""

    stream: Tensor
    ids: Tensor


class LayerModel(Protocol):
    """A model, layer by layer. Streams come from the CPU and go there."""

    def embed(self, tokens: NDArray[np.integer]) -> Tensor:
        """Token ids [n_seq, len] to the stream that enters the first layer."""
        ...

    def layer(self, layer: int, stream: Tensor) -> Behind:
        """Run one layer; the stream that enters it stays as it is."""
        ...

    def head(self, low: int, high: int) -> Logits:
        """Load rows low to high of the vocabulary's matrix."""
        ...


class _Choices(Observer):
    """Keeps the experts that a layer routes to, i64 [n, k]."""

    ids: Tensor

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        self.ids = routing.ids


@dataclass(frozen=True)
class TorchModel:
    """Any weights through the reference forward, on a device of torch's."""

    weights: Weights
    config: ModelConfig
    device: torch.device = CPU

    def embed(self, tokens: NDArray[np.integer]) -> Tensor:
        return embed(self.weights, tokens)

    def layer(self, layer: int, stream: Tensor) -> Behind:
        choices = _Choices()
        with torch.inference_mode():
            behind = layer_forward(self.weights, self.config, layer, stream.to(self.device), choices)
        return Behind(behind.cpu(), choices.ids.cpu())

    def head(self, low: int, high: int) -> Logits:
        like = torch.empty(0, device=self.device)
        norm = load(self.weights, "model.norm.weight", like)
        rows = torch.from_numpy(np.ascontiguousarray(_rows(self.weights, low, high))).to(like)

        def logits(hidden: Tensor) -> Tensor:
            with torch.inference_mode():
                return F.linear(rms_norm(hidden.to(self.device), norm, self.config.rms_norm_eps), rows).cpu()

        return logits


def _rows(weights: Weights, low: int, high: int) -> NDArray[np.float32]:
    """Rows of the vocabulary's matrix, f32 [high - low, H]."""
    name = "lm_head.weight"
    return (
        weights.rows(name, low, high) if isinstance(weights, RowWeights) else weights.weight(name)[low:high]
    )


@dataclass(frozen=True)
class KernelLayers:
    """An HFQ file through the kernels."""

    model: KernelModel

    def embed(self, tokens: NDArray[np.integer]) -> Tensor:
        backend = self.model.backend
        return torch.from_numpy(np.stack([backend.download(self.model.embed(ids)) for ids in tokens]))

    def layer(self, layer: int, stream: Tensor) -> Behind:
        model, backend = self.model, self.model.backend
        states = [backend.upload(sequence.numpy()) for sequence in stream]
        at = [model.positions(0, stream.shape[1])] * len(states)
        ids = model.layer(layer, states, at, [model.cache() for _ in states])
        behind = torch.from_numpy(np.stack([backend.download(state) for state in states]))
        return Behind(behind, torch.from_numpy(ids.astype(np.int64)))

    def head(self, low: int, high: int) -> Logits:
        rows = self.model.head(low, high)
        upload = self.model.backend.upload
        return lambda hidden: torch.from_numpy(rows(upload(np.ascontiguousarray(hidden.numpy()))))
