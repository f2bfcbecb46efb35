"""A bounded walk over a GGUF file's header, before the gguf package may touch it.

The package makes an object per array element and trusts every count, so a small hostile file could make it allocate
without bound. Here each count and length is held against the file's size first. Reads plain files; raises ValueError.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

MAGIC = b"GGUF"
COUNT_LIMIT = 1 << 17
ELEMENT_LIMIT = 1 << 18
NAME_LIMIT = 1 << 12
DIMS_LIMIT = 4

_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _Walk:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.elements = 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("the file ends inside its header")
        return data

    def number(self, fmt: str) -> int:
        value: int = struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt)))[0]
        return value

    def count(self, fmt: str, limit: int, what: str) -> int:
        value = self.number(fmt)
        if value > limit:
            raise ValueError(f"{value} {what}, more than {limit}")
        return value

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("a length in the header reaches beyond the file")
        self.file.seek(count, os.SEEK_CUR)

    def name(self) -> str:
        name = self.take(self.count("Q", NAME_LIMIT, "bytes in a name")).decode("utf-8")
        if not name.isprintable():
            raise ValueError(f"the name {name!r} cannot be printed")
        return name

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            self.elements += count
            if self.elements > ELEMENT_LIMIT:
                raise ValueError(f"its arrays hold more than {ELEMENT_LIMIT} elements")
            if inner == _STRING:
                for _ in range(count):
                    self.skip(self.number("Q"))
            elif inner in _SCALAR_BYTES:
                self.skip(count * _SCALAR_BYTES[inner])
            else:
                raise ValueError(f"an array of type {inner}")
        elif kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        else:
            raise ValueError(f"a value of unknown type {kind}")

    def tensor(self) -> None:
        name = self.name()
        items = 1
        for _ in range(self.count("I", DIMS_LIMIT, f"dimensions in {name}")):
            items *= self.number("Q")
        self.number("I")
        if items > self.size or self.number("Q") > self.size:
            raise ValueError(f"tensor {name} reaches beyond the file")


def check_gguf_header(path: Path) -> None:
    """Raise ValueError, UnicodeDecodeError included, unless all counts and lengths stay inside the file."""
    with path.open("rb") as f:
        walk = _Walk(f)
        if walk.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = walk.number("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not known, or of the other byte order")
        tensors = walk.count("Q", COUNT_LIMIT, "tensors")
        for _ in range(walk.count("Q", COUNT_LIMIT, "keys")):
            walk.name()
            walk.value(walk.number("I"))
        for _ in range(tensors):
            walk.tensor()
