"""Hashes of a file that is being written, in file order while the work goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import xxhash

from ...formats.hfq import QuantizationHash, TensorMeta

READ_BYTES = 8 << 20


class Range(Protocol):
    """Bytes [start, start + nbytes) of the payloads that are written, noted and resumed as one, under a key."""

    @property
    def key(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Payload(Protocol):
    """One tensor's bytes [start, start + nbytes) of the payloads, and its line of the index."""

    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def meta(self) -> TensorMeta: ...


class RunningHash:
    """Hashes tensors in file order, each as soon as all bytes up to its end are written.

    `read(offset, nbytes)` gives back written bytes; offsets count from the first payload. Ranges and tensors cover the
    same bytes without holes.
    """

    def __init__(
        self, ranges: Sequence[Range], tensors: Sequence[Payload], read: Callable[[int, int], bytes]
    ) -> None:
        self._ranges = deque(sorted(ranges, key=lambda each: each.start))
        self._tensors = deque(tensors)
        self._read = read
        self._written: set[str] = set()
        self._complete_to = 0
        self._whole = QuantizationHash()
        self.checksums: list[str] = []
        """The xxh64 of each tensor hashed so far, 16 hexadecimal digits."""

    @property
    def quantization_hash(self) -> str:
        """The hash over all tensors hashed so far, 16 hexadecimal digits."""
        return self._whole.hexdigest

    def advance(self, key: str) -> None:
        """Note that a range's bytes stand in the file, and hash the tensors that became complete by it."""
        self._written.add(key)
        while self._ranges and self._ranges[0].key in self._written:
            first = self._ranges.popleft()
            self._written.discard(first.key)
            self._complete_to = first.start + first.nbytes
        while self._tensors and self._tensors[0].start + self._tensors[0].nbytes <= self._complete_to:
            tensor = self._tensors.popleft()
            checksum = xxhash.xxh64()
            self._whole.update(tensor.meta(), self._pieces(tensor, checksum))
            self.checksums.append(checksum.hexdigest())

    def _pieces(self, tensor: Payload, checksum: xxhash.xxh64) -> Iterator[bytes]:
        stop = tensor.start + tensor.nbytes
        for at in range(tensor.start, stop, READ_BYTES):
            data = self._read(at, min(READ_BYTES, stop - at))
            checksum.update(data)
            yield data
