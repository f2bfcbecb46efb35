"""Stage 1: everything that the engine's loader needs of a file, and everything that it silently gets wrong.

Names, shapes, formats that run, equal formats within a layer, AWQ scales, config keys, tokenizer, counts and hashes are
held against the specification; every payload is read once, in pieces. Each problem names its tensor or metadata key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ...formats.blocks import (
    F16_FORMAT,
    FORMATS,
    AffineFormat,
    FloatFormat,
    Format,
    LloydFormat,
    Q8Format,
)
from ...formats.engine_rules import refused, uneven
from ...formats.errors import ConfigError
from ...formats.hfq import HfqFile, QuantizationHash, TensorEntry
from ...formats.hfq.checked import stated_checksums
from ...formats.hfq.layout import ENGINE_KEYS, metadata_checksum
from ...formats.hfq.provenance import Provenance
from ...formats.hfq.totals import FormatTotals, by_format
from ...formats.minimax import ARCH_ID, ModelConfig, awq_scale_name, inventory, normalize_config, parse_config
from ...formats.strictjson import JsonError, parse_object
from ...formats.tokenizer import vocabulary_problems
from ...formats.watch import UNWATCHED, Watch
from ..model.hfq_weights import pieces
from .stage import StageResult

Problems = Iterator[str]


@dataclass(frozen=True)
class StructureFigures:
    """The quantization hash as it comes out of the payloads, and what the file holds, format by format."""

    quantization_hash: str
    tensors: int
    by_format: Mapping[str, FormatTotals]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_structure(file: HfqFile, watch: Watch = UNWATCHED) -> StageResult:
    """Check a file's metadata, index and payloads; `seen` counts the tensors that were read."""
    problems = list(_header_problems(file))
    notes: list[str] = []
    config = file.metadata.get("config")
    cfg = None
    try:
        cfg = parse_config(config if isinstance(config, Mapping) else {})
    except ConfigError as e:
        problems.append(f"metadata.config: {e.problem}")
    if cfg is not None and isinstance(config, Mapping):
        problems += _config_problems(config)
        problems += _inventory_problems(file, cfg)
        problems += _layer_problems(file, cfg)
        problems += _count_problems(file, cfg)
    problems += _tokenizer_problems(file, cfg, notes)
    provenance = Provenance.of(file)
    stated = tuple(stated_checksums(file).values()) or None
    if stated is None:
        notes.append(
            "the file does not give a checksum per tensor, so only the hash of the whole file is checked"
        )
    if file.trailing_bytes:
        notes.append(
            f"{file.trailing_bytes} bytes follow the last tensor; the engine ignores them, and so does this check"
        )
    problems += _edited(file, provenance)
    recomputed, wrong = _read_payloads(file, stated, watch)
    problems += wrong
    problems += _hash_problems(file, recomputed)
    count = len(file.entries)
    figures = StructureFigures(recomputed, count, by_format(file.entries))
    return StageResult("structure", count, "tensors", tuple(problems), tuple(notes), figures)


def _header_problems(file: HfqFile) -> Problems:
    if file.arch_id != ARCH_ID:
        yield f"header: arch_id is {file.arch_id}, MiniMax-M2 is {ARCH_ID}"
    if file.metadata.get("architecture") != "minimax_m2":
        yield f"metadata.architecture: is {file.metadata.get('architecture')!r}, not 'minimax_m2'"
    for key in ("tokenizer_config", "generation_config"):
        value = file.metadata.get(key)
        if value is not None and not isinstance(value, Mapping):
            yield f"metadata.{key}: is {type(value).__name__}, not an object"


def _config_problems(config: Mapping[str, Any]) -> Problems:
    for key, value in normalize_config(config).items():
        if key not in config:
            yield f"metadata.config.{key}: is missing, and the engine's default for it may run the model wrongly"
        elif config[key] != value:
            yield f"metadata.config.{key}: is {config[key]!r}, not {value!r}"


def _inventory_problems(file: HfqFile, cfg: ModelConfig) -> Problems:
    known = set()
    for spec in inventory(cfg):
        known.add(spec.name)
        if spec.name not in file:
            yield f"{spec.name}: is missing"
            continue
        entry = file.entry(spec.name)
        why = refused(spec, entry.quant_type)
        if entry.shape != spec.shape:
            yield f"{spec.name}: has shape {list(entry.shape)}, the config calls for {list(spec.shape)}"
        if why:
            yield f"{spec.name}: is stored as {_name(entry)}; {why}"
    known.update(awq_scale_name(layer) for layer in range(cfg.num_hidden_layers))
    for entry in file.entries:
        if entry.name not in known:
            yield f"{entry.name}: is not a tensor of this model"


def _name(entry: TensorEntry) -> str:
    fmt = FORMATS.get(entry.quant_type)
    return fmt.name if fmt else f"quant_type {entry.quant_type}"


def _layer_problems(file: HfqFile, cfg: ModelConfig) -> Problems:
    """The loader reads a layer's formats from expert 0, and skips sidecars of another form without a word."""
    stored = ((spec, file.entry(spec.name).quant_type) for spec in inventory(cfg) if spec.name in file)
    for odd, model in uneven(stored):
        names = [_name(file.entry(spec.name)) for spec in (odd, model)]
        yield f"{odd.name}: is {names[0]}, but {model.name} is {names[1]}; a layer needs one format"
    present = [layer for layer in range(cfg.num_hidden_layers) if awq_scale_name(layer) in file]
    for layer in range(cfg.num_hidden_layers):
        name = awq_scale_name(layer)
        if name in file:
            entry = file.entry(name)
            if entry.quant_type != F16_FORMAT.quant_type or entry.shape != (cfg.hidden_size,):
                yield f"{name}: is {_name(entry)} {list(entry.shape)}, not F16 [{cfg.hidden_size}]: the loader skips it"
        elif present:
            yield f"{name}: is missing, though layer {present[0]} has its AWQ scale"


def _count_problems(file: HfqFile, cfg: ModelConfig) -> Problems:
    counts = file.metadata.get("parameter_counts")
    if not isinstance(counts, Mapping):
        yield "metadata.parameter_counts: is missing"
        return
    total = sum(math.prod(spec.shape) for spec in inventory(cfg))
    if counts.get("total_params") != total:
        yield f"metadata.parameter_counts.total_params: is {counts.get('total_params')}, the config gives {total}"


def _tokenizer_problems(file: HfqFile, cfg: ModelConfig | None, notes: list[str]) -> Problems:
    text = file.metadata.get("tokenizer")
    if text is None:
        notes.append("the file has no tokenizer, so the engine can run it on token ids only")
        return
    if not isinstance(text, str):
        yield f"metadata.tokenizer: is {type(text).__name__}, not tokenizer.json as a string"
        return
    try:
        document = parse_object(text.encode("utf-8"))
    except (JsonError, UnicodeEncodeError) as e:
        yield f"metadata.tokenizer: {e}"
        return
    size = cfg.vocab_size if cfg is not None else 1 << 32
    yield from (f"metadata.tokenizer: {problem}" for problem in vocabulary_problems(document, size))
    config = file.metadata.get("tokenizer_config")
    if not (isinstance(config, Mapping) and config.get("chat_template")):
        notes.append("the file has no chat template")


def _read_payloads(file: HfqFile, stated: Sequence[str] | None, watch: Watch) -> tuple[str, list[str]]:
    """The recomputed quantization hash, and what is wrong with any payload: its checksum or its levels."""
    digest, problems = QuantizationHash(), []
    watch.begin("structure", sum(entry.nbytes for entry in file.entries), "bytes")
    for i, entry in enumerate(file.entries):
        checksum, levels = xxhash.xxh64(), _Levels(entry)
        digest.update(entry, _tee(file, entry, checksum, levels))
        if stated is not None and checksum.hexdigest() != stated[i]:
            problems.append(
                f"{entry.name}: its bytes are not those that were written (checksum {checksum.hexdigest()})"
            )
        if levels.problem:
            problems.append(f"{entry.name}: {levels.problem}")
        watch.advance(entry.nbytes, entry.name)
    return digest.hexdigest, problems


def _tee(file: HfqFile, entry: TensorEntry, checksum: Any, levels: _Levels) -> Iterator[NDArray[np.uint8]]:
    source = pieces(file, entry) if entry.quant_type in FORMATS else file.chunks(entry)
    for piece in source:
        checksum.update(piece.data)
        levels.look(piece)
        yield piece


def _edited(file: HfqFile, provenance: Provenance) -> Problems:
    """The build records a checksum of what the engine reads besides payloads: config, tokenizer and so on."""
    stated = provenance.metadata_checksum
    if stated is not None and stated != metadata_checksum(file.metadata):
        yield f"metadata: {', '.join(ENGINE_KEYS)} are not as they were written: one of them was edited"


class _Levels:
    """Looks at the levels of every group of one tensor and keeps the first problem."""

    def __init__(self, entry: TensorEntry) -> None:
        self.fmt: Format | None = FORMATS.get(entry.quant_type)
        self.sidecar = entry.name.endswith("awq_scale_gate_up.weight")
        self.groups = 0
        self.problem: str | None = None if self.fmt else f"quant_type {entry.quant_type} is unknown"

    def look(self, piece: NDArray[np.uint8]) -> None:
        if self.fmt is None:
            return
        bad = _bad_groups(self.fmt, piece)
        if self.sidecar:
            bad |= ~(self.fmt.decode(piece)[:, 0] > 0)
        if bad.any() and self.problem is None:
            first = self.groups + int(bad.argmax())
            what = "is not positive and finite" if self.sidecar else _SANE[type(self.fmt)]
            self.problem = f"group {first} {what}"
        self.groups += len(bad)


_HEADS: dict[type[Format], tuple[str, int]] = {
    FloatFormat: ("<f4", 1),
    Q8Format: ("<f2", 1),
    AffineFormat: ("<f4", 2),
    LloydFormat: ("<f2", 0),
}
"""The dtype and number of the levels at the head of a group; 0 where it is the codebook's size."""
_SANE: dict[type[Format], str] = {
    FloatFormat: "is not finite",
    Q8Format: "has a scale that is not finite",
    AffineFormat: "has a scale or zero that is not finite",
    LloydFormat: "has centroids that are not finite and ascending",
}


def _bad_groups(fmt: Format, piece: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which groups of a piece no encoder writes, from their heads alone: bool [groups]."""
    dtype, count = _HEADS[type(fmt)]
    count = count or fmt.levels
    if isinstance(fmt, FloatFormat):
        dtype = fmt.dtype.str
    width = np.dtype(dtype).itemsize * count
    levels: NDArray[Any] = np.ascontiguousarray(fmt.groups(piece)[:, :width]).view(dtype)
    bad: NDArray[np.bool_] = np.logical_not(np.isfinite(levels).all(axis=1))
    if isinstance(fmt, LloydFormat):
        bad |= (levels[:, 1:] < levels[:, :-1]).any(axis=1)
    return bad


def _hash_problems(file: HfqFile, recomputed: str) -> Problems:
    record = file.metadata.get("quantization_hash")
    if not isinstance(record, Mapping):
        yield "metadata.quantization_hash: is missing"
        return
    expected = {
        **QuantizationHash().record(str(record.get("producer"))),
        "value": recomputed,
        "tensor_count": len(file.entries),
        "payload_bytes": sum(entry.nbytes for entry in file.entries),
    }
    for key, value in expected.items():
        if record.get(key) != value:
            yield f"metadata.quantization_hash.{key}: is {record.get(key)!r}, the file gives {value!r}"
