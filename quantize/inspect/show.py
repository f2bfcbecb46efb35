"""What `mq-quant inspect` shows of a file: its header, metadata and tensors, one tensor decoded, or its provenance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...formats.blocks import FORMATS
from ...formats.errors import HfqError, HfqKind, RecipeError
from ...formats.hfq import HfqFile, TensorEntry, open_hfq
from ...formats.hfq.checked import CheckedFile
from ...formats.hfq.provenance import Provenance, stated_quantization_hash
from ...formats.hfq.totals import FormatTotals, by_format, format_name
from ...formats.minimax import expert_of

CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_local_experts",
    "num_experts_per_tok",
    "intermediate_size",
    "vocab_size",
)
"""The keys of config that are shown; the values are as in the file, of any type."""
PIECE_BYTES = 8 << 20
"""A payload is decoded in pieces of about this size."""


@dataclass(frozen=True)
class Header:
    """The file as a container. `trailing_bytes` follow the last tensor: newer tools of the engine append metadata."""

    version: int
    arch_id: int
    tensor_count: int
    data_offset: int
    total_bytes: int
    trailing_bytes: int


@dataclass(frozen=True)
class MetadataSummary:
    """What a person wants to know of the metadata. A file of another program may lack any of it (None)."""

    bytes: int
    architecture: Any
    config: Mapping[str, Any]
    tokenizer: bool
    chat_template: bool
    quantization_hash: str | None
    tier: str | None
    fit: str | None
    keys: tuple[str, ...]


@dataclass(frozen=True)
class TensorRow:
    """One line of the index; `offset` counts from the start of the file."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class TensorStatistics:
    """Over all values of a tensor in its stored basis; None where the number is not finite."""

    weights: int
    mean: float | None
    rms: float | None
    min: float | None
    max: float | None
    finite: bool


@dataclass(frozen=True)
class DecodedTensor:
    """One tensor decoded; `basis` is `rotated` or `plain`, non-finite values of the first groups are None."""

    row: TensorRow
    basis: str
    statistics: TensorStatistics
    first_groups: tuple[tuple[float | None, ...], ...]

    def as_json(self) -> dict[str, Any]:
        shown = asdict(self)
        return {**shown.pop("row"), **shown}


@dataclass(frozen=True)
class FileSummary:
    """One file: `tensors` are those that were asked for, `tensor` the one that was to be decoded, if any. `gate_up` and
    `down` are the formats of experts by layer, those of expert 0, by which the engine goes.
    """

    path: Path
    header: Header
    metadata: MetadataSummary
    by_format: Mapping[str, FormatTotals]
    gate_up: Mapping[int, str]
    down: Mapping[int, str]
    tensors: tuple[TensorRow, ...]
    tensor: DecodedTensor | None

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "header": asdict(self.header),
            "metadata": asdict(self.metadata),
            "by_format": {name: totals.as_json() for name, totals in self.by_format.items()},
            "gate_up": self.gate_up,
            "down": self.down,
            "tensors": [asdict(row) for row in self.tensors],
            "tensor": self.tensor.as_json() if self.tensor else None,
        }


def inspect_file(
    path: Path, pattern: str | None = None, tensor: str | None = None, groups: int = 2
) -> FileSummary:
    """Header, metadata, the tensors whose name holds the regular expression `pattern`, and `tensor` decoded.

    Raises HfqError for a file that is not one and for a `tensor` that is damaged, RecipeError for a pattern that is no
    regular expression.
    """
    with CheckedFile(path) as file:
        header = Header(
            file.version,
            file.arch_id,
            len(file.entries),
            file.data_offset,
            file.data_offset + sum(entry.nbytes for entry in file.entries) + file.trailing_bytes,
            file.trailing_bytes,
        )
        return FileSummary(
            path,
            header,
            summarise(file.metadata, len(file.metadata_bytes)),
            by_format(file.entries),
            _by_layer(file, "w1"),
            _by_layer(file, "w2"),
            tuple(row(entry) for entry in matching(file, pattern)),
            decoded(file, tensor, groups) if tensor else None,
        )


def matching(file: HfqFile, pattern: str | None) -> list[TensorEntry]:
    """The tensors whose name holds a regular expression; all without one."""
    try:
        search = re.compile(pattern or "").search
    except (re.error, RecursionError, OverflowError) as e:
        raise RecipeError(f"{pattern!r} is not a regular expression: {e}", hint="check --filter") from None
    return [entry for entry in file.entries if search(entry.name)]


def _by_layer(file: HfqFile, projection: str) -> dict[int, str]:
    places = ((expert_of(entry.name), format_name(entry.quant_type)) for entry in file.entries)
    return {place[0]: name for place, name in places if place and place[1:] == (0, projection)}


def row(entry: TensorEntry) -> TensorRow:
    return TensorRow(entry.name, format_name(entry.quant_type), entry.shape, entry.offset, entry.nbytes)


def summarise(metadata: Mapping[str, Any], size: int) -> MetadataSummary:
    """The summary of metadata that takes `size` bytes; any value of it may be of any type."""
    recipe = Provenance.read(metadata).recipe
    config, tokenizer = (
        value if isinstance(value := metadata.get(key), dict) else {}
        for key in ("config", "tokenizer_config")
    )
    return MetadataSummary(
        bytes=size,
        architecture=metadata.get("architecture"),
        config={key: config.get(key) for key in CONFIG_KEYS},
        tokenizer=isinstance(metadata.get("tokenizer"), str),
        chat_template="chat_template" in tokenizer,
        quantization_hash=stated_quantization_hash(metadata),
        tier=recipe.tier if recipe else None,
        fit=recipe.fit if recipe else None,
        keys=tuple(sorted(metadata)),
    )


def decoded(file: HfqFile, name: str, groups: int) -> DecodedTensor:
    """Statistics of one tensor in its stored basis, and its first groups decoded; HfqError for unknown formats.

    Sums are taken in f64, piece by piece.
    """
    entry = file.entry(name)
    fmt = FORMATS.get(entry.quant_type)
    if fmt is None:
        raise HfqError(
            f"is of the unknown quant_type {entry.quant_type}",
            kind=HfqKind.UNKNOWN_FORMAT,
            file=file.path,
            tensor=name,
        )
    count, total, square, low, high, finite = 0, 0.0, 0.0, math.inf, -math.inf, True
    step = fmt.group_bytes * max(1, PIECE_BYTES // fmt.group_bytes)
    for start in range(0, entry.nbytes, step):
        part = file.read_range(entry, start, min(start + step, entry.nbytes))
        with np.errstate(invalid="ignore", over="ignore"):
            values = fmt.decode(part).astype(np.float64)
            count, total = count + values.size, total + float(values.sum())
            square += float(np.square(values).sum())
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        finite = finite and bool(np.isfinite(values).all())
    shown = max(1, 8 if fmt.group == 1 else groups)
    with np.errstate(invalid="ignore", over="ignore"):
        first = fmt.decode(file.read_range(entry, 0, min(entry.nbytes, shown * fmt.group_bytes)))
    return DecodedTensor(
        row(entry),
        "rotated" if fmt.rotated else "plain",
        TensorStatistics(
            weights=count,
            mean=_number(total / count),
            rms=_number(math.sqrt(square / count) if square >= 0 else square),
            min=_number(low),
            max=_number(high),
            finite=finite,
        ),
        tuple(tuple(_number(float(v)) for v in group) for group in first),
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def provenance(path: Path) -> Provenance:
    """The provenance that mq-quant wrote into a file; HfqError where another program made it."""
    with open_hfq(path) as file:
        record = Provenance.of(file)
    if not record.document:
        raise HfqError(
            "holds no provenance",
            kind=HfqKind.PROVENANCE,
            file=path,
            hint="mq-quant did not make it, or its metadata was edited",
        )
    return record
