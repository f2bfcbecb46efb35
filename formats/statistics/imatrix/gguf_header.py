"""The header of a GGUF file, read without trusting a count or a length in it.

The gguf package maps the whole file and makes an object per array element, so a small hostile file could make it
allocate without bound, and a file that shrinks while it is mapped ends the process. This reader holds each count
against a limit and each length against the file's size, and keeps the values of few keys only.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAGIC = b"GGUF"
VERSIONS = (2, 3)
F32 = 0
COUNT_LIMIT = 1 << 17
ELEMENT_LIMIT = 1 << 18
NAME_LIMIT = 1 << 12
TEXT_LIMIT = 1 << 16
DIMS_LIMIT = 4
HEADER_LIMIT = 64 << 20
TYPE = "general.type"
ALIGNMENT, ALIGNMENT_LIMIT = "general.alignment", 1 << 16
KEPT = ("general.", "imatrix.")
"""Keys that begin so are handed out with their values; all others are only walked over."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type's number, its dimensions (the fastest first), and where in the file its data begins."""

    kind: int
    dims: tuple[int, ...]
    start: int

    @property
    def items(self) -> int:
        """The number of values."""
        count = 1
        for n in self.dims:
            count *= n
        return count


@dataclass(frozen=True)
class GgufHeader:
    """The values of the keys that begin as KEPT says, and all tensors by name."""

    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(file: BinaryIO, size: int, kind: str) -> GgufHeader:
    """The header of an open GGUF file of `size` bytes; ValueError, UnicodeDecodeError included, for a broken one.

    Where the file says that it is of another type than `kind`, such as a model, it is read no further: then there are
    no tensors.
    """
    walk = _Walk(file, size)
    if walk.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = walk.number("I")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} is not known, or of the other byte order")
    tensor_count = walk.count("Q", COUNT_LIMIT, "tensors")
    keys: dict[str, Any] = {}
    for _ in range(walk.count("Q", COUNT_LIMIT, "keys")):
        name = walk.name()
        if name in keys:
            raise ValueError(f"Duplicate key {name}")
        keys[name] = walk.value(walk.number("I"), name.startswith(KEPT))
        if name == TYPE and keys[name] != kind:
            return GgufHeader(keys, {})
    found: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name, tensor = walk.tensor()
        if name in found:
            raise ValueError(f"the name of tensor {name} is duplicated")
        found[name] = tensor
    data = _aligned(file.tell(), keys.get(ALIGNMENT, 32))
    kept = {name: value for name, value in keys.items() if name.startswith(KEPT)}
    return GgufHeader(kept, {n: GgufTensor(t.kind, t.dims, data + t.start) for n, t in found.items()})


def _aligned(position: int, alignment: Any) -> int:
    """Where the data begins behind a header that ends at `position`."""
    good = isinstance(alignment, int) and 0 < alignment <= ALIGNMENT_LIMIT and not alignment & (alignment - 1)
    if not good:
        raise ValueError(f"its alignment is {alignment!r}, not a power of two up to {ALIGNMENT_LIMIT}")
    step = int(alignment)
    return -(-position // step) * step


class _Walk:
    """Steps through a header from its beginning, every step held against the file's size."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.elements = 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("the file ends inside its header")
        if self.file.tell() > HEADER_LIMIT:
            raise ValueError(f"its header is larger than {HEADER_LIMIT} bytes")
        return data

    def number(self, fmt: str) -> Any:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt)))[0]

    def count(self, fmt: str, limit: int, what: str) -> int:
        value: int = self.number(fmt)
        if value > limit:
            raise ValueError(f"{value} {what}, more than {limit}")
        return value

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("a length in the header reaches beyond the file")
        self.file.seek(count, 1)

    def name(self) -> str:
        name = self.take(self.count("Q", NAME_LIMIT, "bytes in a name")).decode("utf-8")
        if not name.isprintable():
            raise ValueError(f"the name {name!r} cannot be printed")
        return name

    def text(self, keep: bool) -> str | None:
        length = self.number("Q")
        if not keep:
            self.skip(length)
            return None
        if length > self.size - self.file.tell():
            raise ValueError("a length in the header reaches beyond the file")
        if length > TEXT_LIMIT:
            raise ValueError(f"a text of {length} bytes, more than {TEXT_LIMIT}")
        return self.take(length).decode("utf-8")

    def value(self, kind: int, keep: bool) -> Any:
        """The value of one key, None where it is not kept: a text, a number, or a list of texts or numbers."""
        if kind == _STRING:
            return self.text(keep)
        if kind == _ARRAY:
            return self.array(keep)
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown type {kind}")
        return self.number(_SCALARS[kind])

    def array(self, keep: bool) -> list[Any] | None:
        inner, count = self.number("I"), self.number("Q")
        self.elements += count
        if self.elements > ELEMENT_LIMIT:
            raise ValueError(f"its arrays hold more than {ELEMENT_LIMIT} elements")
        if inner == _STRING:
            texts = [self.text(keep) for _ in range(count)]
            return texts if keep else None
        if inner not in _SCALARS:
            raise ValueError(f"an array of type {inner}")
        fmt = f"{count}{_SCALARS[inner]}"
        length = struct.calcsize("<" + fmt)
        if not keep:
            self.skip(length)
            return None
        return list(struct.unpack("<" + fmt, self.take(length)))

    def tensor(self) -> tuple[str, GgufTensor]:
        """One tensor's name and place, which still counts from the beginning of the data."""
        name = self.name()
        dims = [self.number("Q") for _ in range(self.count("I", DIMS_LIMIT, f"dimensions in {name}"))]
        kind, offset = self.number("I"), self.number("Q")
        tensor = GgufTensor(kind, tuple(dims), offset)
        if tensor.items > self.size or offset > self.size:
            raise ValueError(f"tensor {name} reaches beyond the file")
        return name, tensor
