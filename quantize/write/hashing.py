"""Hashes of a file that is being written, in file order while the work goes on. Depends on job, output and units."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import xxhash

from ...formats.hfq import QuantizationHash
from ..pipeline.build_spec import Job
from ..pipeline.work_units import Unit
from .partial_file import PartialOutput

READ_BYTES = 8 << 20


class Follower:
    """Hashes tensors in file order as soon as all bytes before them are written, reading them back from the file."""

    def __init__(self, job: Job, output: PartialOutput, order: Sequence[Unit]) -> None:
        self._job, self._output = job, output
        self._order = deque(order)
        self._done: set[str] = set()
        self._tensors = deque(job.plan.tensors)
        self._complete_to = 0
        self.hash = QuantizationHash()
        self.checksums: list[str] = []

    def advance(self, unit: Unit) -> None:
        """Note that a unit's bytes stand in the file, and hash what has become complete."""
        self._done.add(unit.key)
        while self._order and self._order[0].key in self._done:
            first = self._order.popleft()
            self._done.discard(first.key)
            self._complete_to = first.start + first.nbytes
        while self._tensors and self._tensors[0].start + self._tensors[0].nbytes <= self._complete_to:
            tensor = self._tensors.popleft()
            checksum = xxhash.xxh64()
            self.hash.update(tensor.meta(), self._read(tensor.start, tensor.nbytes, checksum))
            self.checksums.append(checksum.hexdigest())

    def _read(self, start: int, nbytes: int, checksum: xxhash.xxh64) -> Iterator[bytes]:
        for at in range(start, start + nbytes, READ_BYTES):
            size = min(READ_BYTES, start + nbytes - at)
            data = self._output.read(self._job.plan.data_offset + at, size)
            checksum.update(data)
            yield data
