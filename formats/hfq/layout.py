"""The bytes of an HFQ file: header, metadata, index and the offsets of payloads, all known from shapes alone.

`layout` therefore fixes the whole file before the first weight is encoded. The quantization hash, which covers index
and payloads, is computed here too.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..blocks import FORMATS
from ..errors import HfqError, HfqKind
from ..strictjson import JsonError, dump_object, object_end, parse_object
from ..text import shown

MAGIC = b"HFQM"
VERSION = 1
METADATA_OFFSET = 32
ALIGNMENT = 4096
"""The first payload of a file that is written here begins at a multiple of this many bytes."""
METADATA_LIMIT = 64 << 20
"""Bytes of the largest metadata that are read or written."""
INDEX_LIMIT = 256 << 20
"""Bytes of the largest index that is read."""
COUNT_LIMIT = 1 << 20
"""Tensors that a file may have."""
DIMS_LIMIT = 8
"""Dimensions that a tensor may have."""
HASH_SCOPE = "hfq_tensor_index_and_payload_v1"
"""What the engine's tools call the bytes that the quantization hash covers."""

HEADER = struct.Struct("<4sIIIQQ")
ENTRY_TAIL = struct.Struct("<IQ")
SMALLEST_ENTRY = 2 + 2 + ENTRY_TAIL.size
HASH_DOMAIN = b"hipfire-hfq-quantized-tensor-payload-v1"

Bytes = bytes | memoryview | NDArray[np.uint8]
"""A payload, whatever holds it."""


@dataclass(frozen=True)
class TensorMeta:
    """One line of the index: `shape` is row-major, `nbytes` the size of the payload."""

    name: str
    quant_type: int
    shape: tuple[int, ...]
    group_size: int
    nbytes: int


@dataclass(frozen=True)
class TensorEntry(TensorMeta):
    """One line of the index and where its payload begins, counted from the start of the file."""

    offset: int


@dataclass(frozen=True)
class Layout:
    """A file before its payloads: `header` is everything up to `data_offset`, padding included."""

    header: bytes
    entries: tuple[TensorEntry, ...]
    data_offset: int
    total_bytes: int


def layout(metadata: Mapping[str, Any] | bytes, tensors: Sequence[TensorMeta], arch_id: int = 10) -> Layout:
    """Lay out a file: its header bytes and every payload's offset.

    `metadata` given as bytes is kept as it is, so that a file read and written again stays the same.
    Raises HfqError where the result would not be a well-formed file.
    """
    try:
        if isinstance(metadata, bytes):
            raw = metadata
            parse_object(raw)
            if object_end(raw) != len(raw):
                raise JsonError("has white space after it")
        else:
            raw = dump_object(metadata)
    except JsonError as e:
        raise HfqError(f"the metadata {e}", kind=HfqKind.METADATA_JSON) from None
    if len(raw) > METADATA_LIMIT:
        raise HfqError(
            f"the metadata takes {len(raw)} bytes, more than {METADATA_LIMIT}", kind=HfqKind.METADATA_SIZE
        )
    check_index(tensors)
    index = struct.pack("<I", len(tensors)) + b"".join(_index_line(t) for t in tensors)
    used = METADATA_OFFSET + len(raw) + len(index)
    data_offset = -(-used // ALIGNMENT) * ALIGNMENT
    header = HEADER.pack(MAGIC, VERSION, arch_id, len(tensors), METADATA_OFFSET, data_offset)
    entries = tuple(place(tensors, data_offset))
    total = data_offset + sum(t.nbytes for t in tensors)
    return Layout((header + raw + index).ljust(data_offset, b"\0"), entries, data_offset, total)


def place(tensors: Iterable[TensorMeta], data_offset: int) -> Iterator[TensorEntry]:
    """The tensors with the offsets of their payloads, which follow each other from `data_offset` on."""
    for t in tensors:
        yield TensorEntry(t.name, t.quant_type, t.shape, t.group_size, t.nbytes, data_offset)
        data_offset += t.nbytes


def _index_line(t: TensorMeta) -> bytes:
    name = t.name.encode("utf-8")
    head = struct.pack("<H", len(name)) + name + struct.pack("<BB", t.quant_type, len(t.shape))
    return head + struct.pack(f"<{len(t.shape)}I", *t.shape) + ENTRY_TAIL.pack(t.group_size, t.nbytes)


def check_index(tensors: Sequence[TensorMeta], file: Path | None = None) -> None:
    """Refuse what no index may hold, be it read or to be written; HfqError names the tensor."""
    if len(tensors) > COUNT_LIMIT:
        raise HfqError(f"{len(tensors)} tensors, more than {COUNT_LIMIT}", kind=HfqKind.TOO_MANY, file=file)
    seen: set[str] = set()
    for t in tensors:
        problem = _entry_problem(t)
        if t.name in seen:
            problem = HfqKind.NAME_TWICE, "the name appears twice in the index"
        if problem:
            kind, text = problem
            raise HfqError(text, kind=kind, file=file, tensor=t.name or "''")
        seen.add(t.name)


def _entry_problem(t: TensorMeta) -> tuple[HfqKind, str] | None:
    if not t.name or not t.name.isprintable() or len(t.name.encode("utf-8")) > 0xFFFF:
        return HfqKind.NAME, "the name is empty, too long, or holds characters that cannot be printed"
    if len(t.shape) > DIMS_LIMIT or any(not 0 < d < 1 << 32 for d in t.shape):
        return (
            HfqKind.SHAPE,
            f"the shape {shown(t.shape)} is not up to {DIMS_LIMIT} dimensions of 1 to 2^32 - 1",
        )
    if not (0 <= t.quant_type < 256 and 0 <= t.group_size < 1 << 32 and 0 <= t.nbytes < 1 << 63):
        text = f"quant_type {t.quant_type}, group_size {t.group_size} or size {t.nbytes} is out of range"
        return HfqKind.FIELD, text
    fmt = FORMATS.get(t.quant_type)
    if fmt is None:
        return None
    weights = math.prod(t.shape)
    if fmt.group > 1 and (not t.shape or t.shape[-1] % fmt.group):
        text = f"shape {t.shape} does not fill whole groups of {fmt.group} along its last dimension"
        return HfqKind.GROUPS, text
    if t.group_size != fmt.group_size:
        text = f"group_size is {t.group_size}, but format {fmt.name} has {fmt.group_size}"
        return HfqKind.GROUP_SIZE, text
    if t.nbytes != fmt.nbytes(weights):
        text = f"{t.nbytes} bytes, but shape {t.shape} in format {fmt.name} takes {fmt.nbytes(weights)}"
        return HfqKind.PAYLOAD_SIZE, text
    return None


def byte_view(data: Bytes) -> memoryview:
    """The bytes of a payload, whatever holds them, without a copy."""
    return data.reshape(-1).data if isinstance(data, np.ndarray) else memoryview(data)


ENGINE_KEYS = ("architecture", "config", "tokenizer", "tokenizer_config", "generation_config")
"""The metadata that the engine acts on; the quantization hash does not cover it."""


def metadata_checksum(metadata: Mapping[str, Any]) -> str:
    """XXH64 (seed 0, 16 hex digits) over ENGINE_KEYS and their values as compact JSON; missing keys count as null."""
    text = dump_object({key: metadata.get(key) for key in ENGINE_KEYS})
    return xxhash.xxh64(text, seed=0).hexdigest()


class QuantizationHash:
    """XXH64 (seed 0) over index lines and payloads, fed in file order; its scope is HASH_SCOPE."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh64(HASH_DOMAIN, seed=0)
        self.tensor_count = 0
        self.payload_bytes = 0

    def update(self, tensor: TensorMeta, data: Bytes | Iterable[Bytes]) -> None:
        """Add one tensor, its payload whole or in chunks; HfqError if that has not `tensor.nbytes` bytes."""
        name = tensor.name.encode("utf-8")
        head = struct.pack("<Q", len(name)) + name + struct.pack("<BQ", tensor.quant_type, len(tensor.shape))
        dims = struct.pack(f"<{len(tensor.shape)}I", *tensor.shape)
        self._hash.update(head + dims + ENTRY_TAIL.pack(tensor.group_size, tensor.nbytes))
        done = 0
        whole = isinstance(data, bytes | memoryview | np.ndarray)
        for chunk in cast(Iterable[Bytes], [data] if whole else data):
            part = byte_view(chunk)
            self._hash.update(part)
            done += part.nbytes
        if done != tensor.nbytes:
            raise HfqError(
                f"{done} bytes were hashed of {tensor.nbytes}", kind=HfqKind.LENGTH, tensor=tensor.name
            )
        self.tensor_count += 1
        self.payload_bytes += done

    @property
    def hexdigest(self) -> str:
        """16 lower-case hexadecimal digits."""
        digest: str = self._hash.hexdigest()
        return digest

    def record(self, producer: str) -> dict[str, Any]:
        """The `quantization_hash` object of the metadata; its length does not depend on the hash."""
        return {
            "algorithm": "xxh64",
            "seed": 0,
            "scope": HASH_SCOPE,
            "value": self.hexdigest,
            "tensor_count": self.tensor_count,
            "payload_bytes": self.payload_bytes,
            "producer": producer,
        }
