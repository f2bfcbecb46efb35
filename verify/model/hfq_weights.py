"""A built file as a source of weights in the original basis: decoded, rotated back, and divided by the AWQ scale.

Gives `weight(name)` like a checkpoint, so that the reference forward can run a quantised file. One tensor at a time,
large ones in pieces, so that memory stays at the size of the f32 result. Depends on numpy and formats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import FORMATS, Format
from ...formats.errors import HfqError
from ...formats.fwht import unrotate
from ...formats.hfq.container import HfqFile, TensorEntry
from ...formats.minimax import awq_scale_name

PIECE = 1 << 22
"""Weights decoded at a time."""
_GATE_UP = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.\d+\.w[13]\.weight")


def format_of(file: HfqFile, entry: TensorEntry) -> Format:
    """The block format of a tensor; HfqError where its quant_type is unknown."""
    fmt = FORMATS.get(entry.quant_type)
    if fmt is None:
        raise HfqError(f"quant_type {entry.quant_type} is unknown", file=file.path, tensor=entry.name)
    return fmt


def pieces(file: HfqFile, entry: TensorEntry, weights: int = PIECE) -> Iterator[NDArray[np.uint8]]:
    """A payload in order, in pieces of whole groups of about `weights` weights."""
    fmt = format_of(file, entry)
    step = max(1, weights // fmt.group) * fmt.group_bytes
    for start in range(0, entry.nbytes, step):
        yield file.read_range(entry, start, min(start + step, entry.nbytes))


class DecodedFile:
    """The weights of an HFQ file as a checkpoint would give them."""

    def __init__(self, file: HfqFile) -> None:
        self.file = file

    def stored(self, name: str) -> NDArray[np.float32]:
        """One tensor in the stored basis, f32 of its shape."""
        entry = self.file.entry(name)
        fmt = format_of(self.file, entry)
        out = np.empty(math.prod(entry.shape), np.float32)
        done = 0
        for piece in pieces(self.file, entry):
            values = fmt.decode(piece).reshape(-1)
            out[done : done + values.size] = values
            done += values.size
        return out.reshape(entry.shape)

    def rows(self, name: str, low: int, high: int) -> NDArray[np.float32]:
        """Rows low to high of a matrix that is not rotated and has no scale, f32 [high - low, K]."""
        entry = self.file.entry(name)
        fmt = format_of(self.file, entry)
        if fmt.rotated or _GATE_UP.fullmatch(name) or not 0 <= low <= high <= entry.shape[0]:
            raise ValueError(f"rows {low}:{high} of {name} cannot be read on their own")
        each = entry.nbytes // entry.shape[0]
        payload = self.file.read_range(entry, low * each, high * each)
        return fmt.decode(payload).reshape(high - low, *entry.shape[1:])

    def weight(self, name: str) -> NDArray[np.float32]:
        """One tensor in the basis of the checkpoint, f32 of its shape."""
        values = self.stored(name)
        if format_of(self.file, self.file.entry(name)).rotated:
            values = unrotate(values)
        match = _GATE_UP.fullmatch(name)
        if match and awq_scale_name(int(match[1])) in self.file:
            values /= self.stored(awq_scale_name(int(match[1])))
        return values
