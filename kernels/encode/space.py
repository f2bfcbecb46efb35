"""Memory of a device that serves one matrix after the other: buffers under names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..runtime.host import Backend, Buffer


@dataclass
class Space:
    """Named buffers that serve one matrix after the other; a buffer grows when a larger matrix comes.

    `moves` counts the buffers that were given up for larger ones: while it stays, a name stands for the same memory.
    """

    backend: Backend
    moves: int = 0
    _held: dict[str, Buffer] = field(default_factory=dict)
    _constants: dict[tuple[int, ...], Buffer] = field(default_factory=dict)

    def take(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer of undefined content; the one that was taken under this name before is no longer valid."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64))
        old = self._held.get(name)
        if old is None or old.dtype != kind or old.size < size:
            self.moves += self._held.pop(name, None) is not None
            del old
            self._held[name] = self.backend.alloc((max(1, size),), kind)
        found = self._held[name]
        return Buffer(self.backend, found.memory, found.address, tuple(int(n) for n in shape), kind)

    def put(self, name: str, array: NDArray[Any]) -> Buffer:
        """The array as a buffer of this name."""
        buffer = self.take(name, array.shape, array.dtype)
        self.backend.write(buffer, array)
        return buffer

    def keep(self, name: str, given: Buffer) -> Buffer:
        """What a buffer holds, as a buffer of this name."""
        buffer = self.take(name, given.shape, given.dtype)
        self.backend.copy(buffer, given)
        return buffer

    def numbers(self, numbers: Sequence[int]) -> Buffer:
        """A list of numbers i32, which never changes."""
        key = tuple(numbers)
        if key not in self._constants:
            self._constants[key] = self.backend.upload(np.array(key, np.int32))
        return self._constants[key]
