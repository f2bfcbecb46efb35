"""Importances from a calibration folder: the same object as from an imatrix, with the second moment of every input.

gate and up see the layer's moment over all tokens; down sees its own expert's, shrunk by its count toward the layer's.
Depends on importance, and on formats (calibration, minimax) and numpy; all arithmetic is f64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.calibration import (
    Calibration,
    LayerFile,
    config_record,
    open_calibration,
    unpack_correlation,
    unpack_moment,
)
from ..formats.errors import CalibrationError
from ..formats.minimax import ModelConfig
from .importance import F64, Importance, LayerImportance

KAPPA = 256.0
"""Tokens that the layer's down moment is worth: an expert seen n times keeps n / (n + κ) of its own."""


@dataclass(frozen=True)
class CalibratedLayer(LayerImportance):
    """One layer of a calibration folder; experts' moments are read when they are asked for. Thread-safe."""

    file: LayerFile
    gate_up: Importance
    down_pooled: F64 = field(repr=False)

    def of(self, expert: int, projection: str) -> Importance:
        """The importance of one expert's matrix, with its moment; the same object for w1 and w3 of all experts."""
        if projection != "w2":
            return self.gate_up
        count = float(self.counts["w2"][expert])
        moment = self.down_pooled
        if count > 0 and "down.moment" in self.file.infos:
            moment = (count * self._own(expert) + KAPPA * moment) / (count + KAPPA)
        return Importance(np.diag(moment).copy(), moment, count)

    def _own(self, expert: int) -> F64:
        """E[x xᵀ] f64 [I, I] over the tokens of one expert."""
        packed = self.file.row("down.moment", expert)
        if packed.dtype == np.float16:
            return unpack_correlation(packed, self.file.row("down.diagonal", expert))
        return unpack_moment(packed, len(self.down_pooled))


def read_layer(file: LayerFile, config: ModelConfig, layer: int, notes: tuple[str, ...]) -> CalibratedLayer:
    """The importances in one layer's file; experts' own moments stay there until they are asked for."""

    def by_projection(kind: str) -> dict[str, F64]:
        """f64 [experts] or [experts, K] of gate, up and down."""
        gate, down = (file.array(f"{matrix}.{kind}").astype(np.float64) for matrix in ("gate_up", "down"))
        return {"w1": gate, "w2": down, "w3": gate}

    gate_up = unpack_moment(file.array("gate_up.moment"), config.hidden_size)
    tokens = float(file.array("gate_up.tokens")[0])
    return CalibratedLayer(
        layer,
        by_projection("diagonal"),
        by_projection("counts"),
        notes,
        file,
        Importance(np.diag(gate_up).copy(), gate_up, tokens),
        unpack_moment(file.array("down.pooled"), config.intermediate_size),
    )


def fallback_notes(layer: int, notes: Sequence[str], unseen: Sequence[int]) -> tuple[str, ...]:
    """What was left out while the layer was gathered, and which experts have no moment of their own."""
    if not unseen:
        return tuple(map(str, notes))
    named = ", ".join(map(str, unseen[:8])) + (", …" if len(unseen) > 8 else "")
    taken = f"layer {layer} w2: experts {named} ({len(unseen)}) without tokens took the layer's moment"
    return (*map(str, notes), taken)


@dataclass(frozen=True)
class CalibratedModel:
    """The importances of a model, read layer by layer from a calibration folder."""

    calibration: Calibration
    config: ModelConfig

    def layer(self, layer: int) -> CalibratedLayer:
        """One layer's importances; CalibrationError where its file is not the one that the manifest names."""
        return read_layer(self.calibration.layer(layer), self.config, layer, self._notes(layer))

    def _notes(self, layer: int) -> tuple[str, ...]:
        record = self.calibration.manifest["layers"][layer]
        return fallback_notes(layer, record.get("notes", ()), record.get("unseen", ()))

    @property
    def coverage(self) -> float:
        """Share of experts that saw a token."""
        experts = self.config.num_local_experts
        seen = [experts - len(r.get("unseen", [])) for r in self.calibration.manifest["layers"]]
        return sum(seen) / (experts * self.config.num_hidden_layers)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What could not be taken from an expert's own tokens, over all layers."""
        return tuple(note for n in range(self.config.num_hidden_layers) for note in self._notes(n))

    def record(self) -> dict[str, Any]:
        """What a file made with it says of it."""
        manifest = self.calibration.manifest
        return {
            "sha256": self.calibration.sha256,
            "tokens": manifest.get("tokens"),
            "down": self.calibration.down,
            "coverage": self.coverage,
        }


def load_calibration(
    folder: str | Path, config: ModelConfig, source: Mapping[str, Any] | None = None
) -> CalibratedModel:
    """Open a folder for a model of these dimensions, and for this source where it is given.

    `source` is {"origin": …, "files": Source.fingerprint()}. Raises CalibrationError naming the difference where the
    folder is of another model, revision or tokenizer, of another schema, or incomplete.
    """
    calibration = open_calibration(folder)
    found, expected = config_record(calibration.config), config_record(config)
    different = [
        f"{k} is {found[k]} there and {expected[k]} here" for k in expected if found[k] != expected[k]
    ]
    if not different and source is not None:
        different = _source_differences(calibration.manifest["source"], source)
    if different:
        raise CalibrationError(
            f"was made from another model: {'; '.join(different[:8])}",
            file=folder,
            hint="calibrate again from the source that is being built",
        )
    return CalibratedModel(calibration, config)


def _source_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Sentences on shards and tokenizer that differ; texts that do not reach the activations may."""
    out = []
    names = {
        n for n in {*there["files"], *here["files"]} if n == "tokenizer.json" or n.endswith(".safetensors")
    }
    for name in sorted(names):
        a, b = (side["files"].get(name, {}).get("sha256") for side in (there, here))
        if a != b:
            out.append(f"{name} has sha256 {str(a)[:12]} there and {str(b)[:12]} here")
    revisions = [side["origin"].get("revision") for side in (there, here)]
    if out and all(revisions) and revisions[0] != revisions[1]:
        out.insert(0, f"revision is {revisions[0]} there and {revisions[1]} here")
    return out
