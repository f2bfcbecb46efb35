"""Importances from a calibration folder: the same object as from an imatrix, with the second moment of every input.

At gate and up all experts share the layer's moment over all tokens. At down each expert has its own, shrunk by the
number of its tokens toward the layer's. Where an imatrix is given too, moments of too few tokens lean on it instead.
All arithmetic is f64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.errors import CalibrationError
from ..formats.minimax import ModelConfig
from ..formats.statistics.moment_file import LayerFile
from ..formats.statistics.moment_folder import Calibration, SourceRecord, config_record, open_calibration
from ..formats.statistics.triangles import unpack_correlation, unpack_moment
from .few_tokens import backed_gate_up, limit, on_correlations, shrunk, thin_notes
from .from_imatrix import SHOWN_EXPERTS, ImatrixLayer, ImatrixModel
from .importance import F64, Importance, summed_energy

MOMENT_PRIOR = 256.0
"""κ: the tokens that the layer's moment at down is worth. An expert seen n times keeps n / (n + κ) of its own."""


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer of a calibration folder. An expert's moment is read from the file each time that it is asked for.

    `diagonals` f64 [experts, K] and `counts` f64 [experts] are E[x²] and tokens per projection. `gate_up` is the
    importance that w1 and w3 of all experts share, `down_pooled` f64 [I, I] the layer's moment at down. Moments of too
    few tokens lean on `imatrix`, where it was given.
    """

    layer: int
    diagonals: dict[str, F64]
    counts: dict[str, F64]
    notes: tuple[str, ...]
    file: LayerFile
    gate_up: Importance
    down_pooled: F64 = field(repr=False)
    imatrix: ImatrixLayer | None = None

    def of(self, expert: int, projection: str) -> Importance:
        """The importance of one matrix, with its moment; the same object for w1 and w3 of all experts."""
        if projection != "w2":
            return self.gate_up
        count = float(self.counts["w2"][expert])
        moment = self._prior(expert, count)
        if count > 0 and "down.moment" in self.file.infos:
            moment = shrunk(self._own(expert), count, moment, MOMENT_PRIOR)
        return Importance(np.diag(moment).copy(), moment, count)

    @property
    def shared(self) -> Importance:
        """The importance that w1 and w3 of all experts share."""
        return self.gate_up

    def gate_up_energy(self) -> F64:
        """Σ over experts of the summed squares at gate and up, f64 [hidden]; the imatrix's where tokens are few."""
        if self.imatrix is not None and self.gate_up.count < limit(len(self.gate_up.diagonal)):
            return self.imatrix.gate_up_energy()
        return summed_energy(self.diagonals, self.counts)

    def _prior(self, expert: int, count: float) -> F64:
        """E[x xᵀ] f64 [I, I] toward which an expert's own moment is shrunk, and which an expert without one takes."""
        if self.imatrix is None or count >= limit(len(self.down_pooled)):
            return self.down_pooled
        return on_correlations(self.down_pooled, self.imatrix.of(expert, "w2").diagonal)

    def _own(self, expert: int) -> F64:
        """E[x xᵀ] f64 [I, I] over the tokens of one expert."""
        packed = self.file.row("down.moment", expert)
        if packed.dtype == np.float16:
            return unpack_correlation(packed, self.file.row("down.diagonal", expert))
        return unpack_moment(packed, len(self.down_pooled))


def read_layer(
    file: LayerFile,
    config: ModelConfig,
    layer: int,
    record: Mapping[str, Any],
    imatrix: ImatrixLayer | None = None,
) -> CalibratedLayer:
    """The importances in one layer's file; the experts' own moments stay there until they are asked for.

    `record` is the layer's entry in the manifest: what was left out when it was gathered, and experts without a token.
    """

    def by_projection(kind: str) -> dict[str, F64]:
        """f64 [experts] or [experts, K] of gate, up and down."""
        gate, down = (file.array(f"{matrix}.{kind}").astype(np.float64) for matrix in ("gate_up", "down"))
        return {"w1": gate, "w2": down, "w3": gate}

    moment = unpack_moment(file.array("gate_up.moment"), config.hidden_size)
    tokens = float(file.array("gate_up.tokens")[0])
    gate_up = Importance(np.diag(moment).copy(), moment, tokens)
    counts = by_projection("counts")
    if imatrix is None:
        notes = unseen_notes(layer, record.get("notes", ()), record.get("unseen", ()))
    else:
        thin = thin_notes(layer, tokens, config.hidden_size, counts["w2"], config.intermediate_size)
        notes = (*map(str, record.get("notes", ())), *thin, *(imatrix.notes if thin else ()))
        if tokens < limit(config.hidden_size):
            gate_up = backed_gate_up(gate_up, imatrix)
    pooled = unpack_moment(file.array("down.pooled"), config.intermediate_size)
    return CalibratedLayer(layer, by_projection("diagonal"), counts, notes, file, gate_up, pooled, imatrix)


def unseen_notes(layer: int, notes: Sequence[str], unseen: Sequence[int]) -> tuple[str, ...]:
    """Sentences on what was left out while the layer was gathered, and on experts without a moment of their own."""
    if not unseen:
        return tuple(map(str, notes))
    named = ", ".join(map(str, unseen[:SHOWN_EXPERTS])) + (", …" if len(unseen) > SHOWN_EXPERTS else "")
    taken = f"layer {layer} w2: experts {named} ({len(unseen)}) without tokens took the layer's moment"
    return (*map(str, notes), taken)


@dataclass(frozen=True)
class CalibratedModel:
    """The importances of a model, read layer by layer from a calibration folder.

    Moments of too few tokens lean on `imatrix`, where it was given.
    """

    calibration: Calibration
    config: ModelConfig
    imatrix: ImatrixModel | None = None

    def layer(self, layer: int) -> CalibratedLayer:
        """One layer's importances; CalibrationError where its file is not the one that the manifest names."""
        behind = self.imatrix.layer(layer) if self.imatrix else None
        record = self.calibration.manifest.layers[layer].model_dump()
        return read_layer(self.calibration.layer(layer), self.config, layer, record, behind)

    @property
    def coverage(self) -> float:
        """Share of experts that saw a token."""
        return coverage_of(self.config, [record.model_dump() for record in self.calibration.manifest.layers])

    def record(self) -> dict[str, Any]:
        """What a file that is made with it says of it."""
        tokens = self.calibration.manifest.tokens
        return calibration_record(self.calibration.sha256, tokens, self.calibration.down, self.coverage)


def coverage_of(config: ModelConfig, records: Sequence[Mapping[str, Any]]) -> float:
    """Share of experts that saw a token, from the manifest's records of all layers."""
    experts = config.num_local_experts
    seen = [experts - len(r.get("unseen", [])) for r in records]
    return sum(seen) / (experts * config.num_hidden_layers)


def calibration_record(sha256: str, tokens: Any, down: str, coverage: float) -> dict[str, Any]:
    """What a file says of the calibration that it was made with; `sha256` is that of the manifest."""
    return {"sha256": sha256, "tokens": tokens, "down": down, "coverage": coverage}


def blank_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what is known only when all layers are gathered, so that its length is known before."""
    return {**record, "sha256": "0" * 64, "coverage": 0.0}


def load_calibration(
    folder: str | Path,
    config: ModelConfig,
    source: Mapping[str, Any] | None = None,
    imatrix: ImatrixModel | None = None,
) -> CalibratedModel:
    """Open a folder for a model of these dimensions, and for this source where it is given.

    Moments of too few tokens lean on `imatrix`. `source` is {"origin": …, "files": Source.fingerprint()}.
    Raises CalibrationError that names the difference where the folder is of another model, revision, tokenizer or
    schema, or is not complete.
    """
    calibration = open_calibration(folder)
    found, expected = config_record(calibration.config), config_record(config)
    different = [
        f"{k} is {found[k]} there and {expected[k]} here" for k in expected if found[k] != expected[k]
    ]
    if not different and source is not None:
        different = _source_differences(calibration.manifest.source, source)
    if different:
        raise CalibrationError(
            f"was made from another model: {'; '.join(different[:8])}",
            file=folder,
            hint="calibrate again from the source that is being built",
        )
    return CalibratedModel(calibration, config, imatrix)


def _source_differences(there: SourceRecord, here: Mapping[str, Any]) -> list[str]:
    """Sentences on shards and tokenizer that differ. Other files do not reach the activations, and may differ."""
    out = []
    old = {name: record.sha256 for name, record in there.files.items()}
    new = {name: record["sha256"] for name, record in here["files"].items()}
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name) and (name == "tokenizer.json" or name.endswith(".safetensors")):
            out.append(
                f"{name} has sha256 {str(old.get(name))[:12]} there and {str(new.get(name))[:12]} here"
            )
    revisions = [there.origin.get("revision"), here["origin"].get("revision")]
    if out and all(revisions) and revisions[0] != revisions[1]:
        out.insert(0, f"revision is {revisions[0]} there and {revisions[1]} here")
    return out
