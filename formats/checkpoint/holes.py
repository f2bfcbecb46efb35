"""Holes of sparse files: where a download tool reserved a shard and wrote nothing, the file system knows it.

A hole reads as zeros. Where a whole tensor lies in one, the checkpoint is refused at once instead of hours later, when
the tensor's turn comes. File systems that know no holes report none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from io import BufferedReader

from ..minimax import may_be_zero
from .safetensors_file import TensorInfo

_SEEK_DATA, _SEEK_HOLE = getattr(os, "SEEK_DATA", None), getattr(os, "SEEK_HOLE", None)


def hollow(file: BufferedReader, tensors: Iterable[TensorInfo]) -> TensorInfo | None:
    """The first of a shard's tensors, given in file order, that lies in a hole of the open file; None without any."""
    holes = list(_holes(file.fileno()))
    for info in tensors if holes else ():
        within = any(start <= info.start and info.stop <= stop for start, stop in holes)
        if within and info.start < info.stop and not may_be_zero(info.name):
            return info
    return None


def _holes(fd: int) -> Iterator[tuple[int, int]]:
    """(first byte, end) of each hole of an open file."""
    if _SEEK_DATA is None or _SEEK_HOLE is None:
        return
    size, at = os.fstat(fd).st_size, 0
    try:
        while at < size:
            start = os.lseek(fd, at, _SEEK_HOLE)
            if start >= size:
                return
            try:
                at = os.lseek(fd, start, _SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    return
                at = size  # the hole reaches to the end
            yield start, at
    except OSError:
        return  # not offered here
