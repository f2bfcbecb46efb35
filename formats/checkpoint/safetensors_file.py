"""Safetensors files as a source of single tensors: the header, read strictly, and one payload at a time by offset.

The shard is never mapped, so that one cut short while it is read is an error and not a crash. Header facts: u64 length,
one JSON object {name: {dtype, shape, data_offsets}}, then payloads without holes or overlaps up to the end of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import lfs
from ..errors import CheckpointError
from ..plain_file import hint_of, open_plain
from ..strictjson import JsonError, parse_object
from ..text import shortened, shown

HEADER_LIMIT = 32 << 20
"""Bytes of the largest header that is read."""
HEAD = 64
"""Bytes at the beginning of a file that tell what it is."""
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_FETCH_AGAIN = "the shard is broken or incomplete; fetch it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard: `shard` is the file's name, `start` and `stop` are byte offsets in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int


def header_length(head: bytes, file: str | Path) -> int:
    """The length of the JSON header that the first bytes of a shard (HEAD or more) state; CheckpointError otherwise."""
    if lfs.is_pointer(head):
        raise CheckpointError(lfs.PROBLEM, file=file, hint=lfs.HINT)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= HEADER_LIMIT:
        found = length if len(head) >= 8 else f"missing, for the file has {len(head)} bytes"
        raise CheckpointError(
            f"is not a safetensors file: its header length is {found}", file=file, hint=_FETCH_AGAIN
        )
    return length


def parse_header(raw: bytes, shard: str, size: int, file: str | Path) -> list[TensorInfo]:
    """The tensors of a shard of `size` bytes from its JSON header `raw`, in file order.

    Raises CheckpointError unless payloads cover the rest of the file exactly once and fit their dtypes and shapes.
    """
    try:
        header = parse_object(raw)
    except JsonError as e:
        raise CheckpointError(f"the safetensors header {e}", file=file, hint=_FETCH_AGAIN) from None
    header.pop("__metadata__", None)
    base = 8 + len(raw)
    infos = sorted((_tensor(n, v, shard, base, file) for n, v in header.items()), key=_position)
    end = base
    for info in infos:
        if info.start != end:
            raise CheckpointError(
                f"its payload begins at byte {info.start}, the one before ends at {end}",
                file=file,
                tensor=info.name,
                hint=_FETCH_AGAIN,
            )
        end = info.stop
    if end != size:
        raise CheckpointError(f"has {size} bytes, its header needs {end}", file=file, hint=_FETCH_AGAIN)
    return infos


def _position(info: TensorInfo) -> tuple[int, int]:
    return info.start, info.stop


def _tensor(name: str, value: Any, shard: str, base: int, file: str | Path) -> TensorInfo:
    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(problem, file=file, tensor=name or "''", hint=_FETCH_AGAIN)

    if not name or not name.isprintable():
        raise refuse("the name is empty or holds characters that cannot be printed")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise refuse("its header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise refuse(f"dtype {shown(dtype)} is not known")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise refuse("shape or data_offsets are not lists of whole numbers")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise refuse(f"takes {stop - start} bytes, but {dtype} {shape} does not")
    return TensorInfo(name, dtype, tuple(shape), shard, base + start, base + stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a shard on disk; raises CheckpointError."""
    try:
        with open_plain(path) as f:
            return header_of(f, path)
    except OSError as e:
        raise CheckpointError(f"cannot be read: {e.strerror}", file=path, hint=hint_of(e)) from None


def header_of(file: BufferedReader, path: Path) -> list[TensorInfo]:
    """The tensors of an open shard, read from its beginning; raises CheckpointError."""
    size = os.fstat(file.fileno()).st_size
    length = header_length(file.read(HEAD), path)
    if 8 + length > size:
        raise CheckpointError("ends inside its header", file=path, hint=_FETCH_AGAIN)
    file.seek(8)
    return parse_header(file.read(length), path.name, size, path)


def by_name(shards: Iterable[list[TensorInfo]], folder: str | Path) -> dict[str, TensorInfo]:
    """All tensors of all shards by name; CheckpointError where two shards hold the same one."""
    out: dict[str, TensorInfo] = {}
    for info in (info for shard in shards for info in shard):
        if info.name in out:
            raise CheckpointError(
                f"lies in two shards, {out[info.name].shard} and {info.shard}", file=folder, tensor=info.name
            )
        out[info.name] = info
    return out


def read_tensor(path: Path, info: TensorInfo) -> NDArray[np.uint8]:
    """A tensor's stored bytes as u8 [stop - start]; CheckpointError where the file cannot be read to their end."""
    try:
        with open_plain(path) as f:
            return payload_of(f, info, path)
    except OSError as e:
        problem = f"cannot be read: {e.strerror}"
        raise CheckpointError(problem, file=path, tensor=info.name, hint=hint_of(e)) from None


def payload_of(file: BufferedReader, info: TensorInfo, path: Path) -> NDArray[np.uint8]:
    """A tensor's stored bytes from its open shard as u8 [stop - start]; CheckpointError where the file ends before."""
    out = np.empty(info.stop - info.start, np.uint8)
    done = 0
    while done < out.size:
        count = os.preadv(file.fileno(), [out[done:].data], info.start + done)
        if count == 0:
            raise CheckpointError(
                "the shard ends inside this tensor", file=path, tensor=info.name, hint=_FETCH_AGAIN
            )
        done += count
    return out


def some(names: Sequence[str], count: int = 8) -> str:
    """Some of many names for a message."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(shortened, sorted(names)[:count])) + more
