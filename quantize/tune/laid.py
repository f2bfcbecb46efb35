"""The layout of a tuned file: the tensors of the file that it is made from, and metadata with room for what is known
at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...formats.hfq import HfqFile, TensorEntry, TensorMeta, layout
from ...formats.hfq.provenance import Provenance
from ...formats.minimax import ModelConfig, awq_scale_name, layer_inventory
from ..spec.metadata import Outcome, complete, relaid


@dataclass(frozen=True)
class Placed:
    """A tensor of the file; `start` counts from the first payload byte."""

    entry: TensorEntry
    start: int

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def meta(self) -> TensorMeta:
        """The tensor's line in the index."""
        e = self.entry
        return TensorMeta(e.name, e.quant_type, e.shape, e.group_size, e.nbytes)


@dataclass(frozen=True)
class Piece:
    """Tensors that follow each other and belong to one layer, or to none; written and resumed as one."""

    key: str
    tensors: tuple[Placed, ...]
    layer: int | None

    @property
    def start(self) -> int:
        return self.tensors[0].start

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class TunedLayout:
    """The whole output, known before the work."""

    metadata: Mapping[str, Any]
    tensors: tuple[Placed, ...]
    pieces: tuple[Piece, ...]
    data_offset: int
    total_bytes: int

    @classmethod
    def of(cls, file: HfqFile, config: ModelConfig, tuning: Mapping[str, Any]) -> TunedLayout:
        """Lay out a copy of a file that says `tuning` of itself."""
        tensors, start = [], 0
        for entry in file.entries:
            tensors.append(Placed(entry, start))
            start += entry.nbytes
        metadata = relaid(
            file.metadata, Provenance.of(file).document, {"tuning": dict(tuning)}, file.entries, config
        )
        laid = layout(metadata, [t.meta() for t in tensors], file.arch_id)
        pieces = tuple(_pieces(tensors, config))
        return cls(metadata, tuple(tensors), pieces, laid.data_offset, laid.total_bytes)

    def header(self, outcome: Outcome, arch_id: int) -> bytes:
        """Everything before the payloads, with what is known at the end."""
        return layout(complete(self.metadata, outcome), [t.meta() for t in self.tensors], arch_id).header


def layer_names(config: ModelConfig, layer: int) -> list[str]:
    """Every tensor that a layer may have in a file, its AWQ scale last."""
    return [*(spec.name for spec in layer_inventory(config, layer)), awq_scale_name(layer)]


def _pieces(tensors: Sequence[Placed], config: ModelConfig) -> list[Piece]:
    layer_of = {name: n for n in range(config.num_hidden_layers) for name in layer_names(config, n)}
    out = []
    for layer, run in groupby(tensors, lambda t: layer_of.get(t.entry.name)):
        same = tuple(run)
        out.append(Piece(f"from {same[0].entry.name}", same, layer))
    return out
