"""All models of an evaluation go through a layer together: the source first, then every file.

Streams lie on the disk between layers, one for each model, so memory holds two of them however many files there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.checkpoint.source import Source
from ...formats.minimax import ModelConfig, layer_inventory
from ...formats.watch import Watch
from ...verify.evaluate.head import Head
from ...verify.model.layer_model import Behind, LayerModel, TorchModel
from ...verify.model.metrics import LayerFigures, layer_figures
from ..calibrate.layer_pass import EMBED
from ..calibrate.run import Reading, weights_of
from ..write.layer_streams import LayerStreams

SOURCE = "source"
END = ("model.norm.weight", "lm_head.weight")


def file_name(index: int) -> str:
    """What the stream of a file is called."""
    return f"file{index}"


@dataclass(frozen=True)
class SourceModel:
    """The source, of which each weight of a layer is read once and released."""

    source: Source
    device: torch.device
    watch: Watch

    def embed(self, tokens: NDArray[np.integer]) -> Tensor:
        embedded = TorchModel(self.source, self.source.config).embed(tokens)
        self.source.release(EMBED)
        return embedded

    def layer(self, layer: int, stream: Tensor) -> Behind:
        config = self.source.config
        reading = Reading(self.source, self.watch, layer, once=True)
        behind = TorchModel(reading, config, self.device).layer(layer, stream)
        reading.finish(list(layer_inventory(config, layer)))
        return behind

    def head(self, low: int, high: int) -> Any:
        return TorchModel(self.source, self.source.config, self.device).head(low, high)

    def schedule(self, first: int) -> None:
        """Ask for the weights from a layer on, in the order in which they are used."""
        config = self.source.config
        names = [s.name for n in range(first, config.num_hidden_layers) for s in layer_inventory(config, n)]
        self.source.schedule([*([] if first else [EMBED]), *names, *END])


@dataclass(frozen=True)
class Models:
    """The models by the names of their streams; `source` is None where its predictions were saved earlier."""

    config: ModelConfig
    source: SourceModel | None
    files: Sequence[LayerModel]

    @property
    def by_name(self) -> dict[str, LayerModel]:
        """All of them, the source first."""
        named: dict[str, LayerModel] = {} if self.source is None else {SOURCE: self.source}
        return named | {file_name(i): model for i, model in enumerate(self.files)}


@dataclass(frozen=True)
class LayersRun:
    """Models on their way through the layers, each with its stream."""

    models: Models
    tokens: NDArray[np.integer]
    streams: LayerStreams
    watch: Watch

    def run(self) -> int:
        """Take all models through the layers that are left; returns how many an earlier run had passed."""
        config, first, count = self.models.config, self.streams.done, len(self.models.by_name)
        weights = [weights_of(list(layer_inventory(config, n))) for n in range(config.num_hidden_layers)]
        self.watch.begin("layers", count * sum(weights), "weights", count * sum(weights[:first]))
        if self.models.source is not None:
            self.models.source.schedule(first)
        for layer in range(first, config.num_hidden_layers):
            self._layer(layer, weights[layer])
        return first

    def heads(self) -> dict[str, Head]:
        """Every model with the stream behind its last layer, of which only what is used comes into memory."""
        count = self.models.config.num_hidden_layers
        return {
            name: Head(model, Mapped(self.streams.mapped(name, count)))
            for name, model in self.models.by_name.items()
        }

    def figures(self, file: int) -> tuple[LayerFigures, ...]:
        """What was found of one file layer by layer; nothing where the source was not run."""
        if self.models.source is None:
            return ()
        records = [self.streams.record(n) for n in range(self.streams.done)]
        return tuple(LayerFigures(**record["figures"][file]) for record in records)

    def _layer(self, layer: int, weights: int) -> None:
        hashes: dict[str, str] = {}
        figures: list[dict[str, Any]] = []
        reference: Behind | None = None
        for name, model in self.models.by_name.items():
            behind = model.layer(layer, self._enter(name, model, layer))
            hashes[name] = self.streams.folder.save(name, layer + 1, behind.stream.numpy())
            if name == SOURCE:
                reference = behind
                continue
            if reference is not None:
                found = layer_figures(layer, reference.stream, behind.stream, reference.ids, behind.ids)
                figures.append(asdict(found))
            self.watch.advance(weights, f"layer {layer}")
        self.streams.end_layer(layer, hashes, figures=figures)

    def _enter(self, name: str, model: LayerModel, layer: int) -> Tensor:
        if layer == 0:
            return model.embed(self.tokens)
        return torch.from_numpy(self.streams.load(name, layer))


@dataclass(frozen=True)
class Mapped:
    """A mapped stream as sequences of tensors."""

    stream: NDArray[np.float32]

    def __getitem__(self, sequence: int) -> Tensor:
        return torch.from_numpy(np.array(self.stream[sequence]))
