"""A built file as a source of weights in the basis of the checkpoint: decoded, rotated back, divided by the AWQ scale.

`DecodedFile.weight(name)` gives one tensor as a checkpoint does, so that the reference forward can run a quantised
file. Large tensors are decoded in pieces, so that memory stays at the size of the f32 result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import HfqError, HfqKind
from ...formats.hfq import HfqFile, TensorEntry
from ...formats.hfq.stored import format_of, stored_form
from ...formats.minimax import ModelConfig, inventory

PIECE = 1 << 22
"""Weights decoded at a time."""


def pieces(file: HfqFile, entry: TensorEntry, weights: int = PIECE) -> Iterator[NDArray[np.uint8]]:
    """A payload in order, in pieces of whole groups of about `weights` weights."""
    fmt = format_of(file, entry)
    step = max(1, weights // fmt.group) * fmt.group_bytes
    for start in range(0, entry.nbytes, step):
        yield file.read_range(entry, start, min(start + step, entry.nbytes))


def check_shapes(file: HfqFile, cfg: ModelConfig) -> None:
    """HfqError that names the first tensor of the model which the file lacks, or holds in another shape.

    What runs a file relies on shapes; a file of other shapes than its own config would lead it out of bounds.
    """
    for spec in inventory(cfg):
        shape = file.entry(spec.name).shape
        if shape != spec.shape:
            raise HfqError(
                f"has shape {list(shape)}, but the file's config calls for {list(spec.shape)}",
                kind=HfqKind.OTHER_SHAPE,
                file=file.path,
                tensor=spec.name,
            )


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
        """Rows low to high of a matrix in the checkpoint's basis, f32 [high - low, K]; ValueError outside of it."""
        entry = self.file.entry(name)
        if not 0 <= low <= high <= entry.shape[0]:
            raise ValueError(f"rows {low}:{high} are not inside the {entry.shape[0]} rows of {name}")
        each = entry.nbytes // entry.shape[0]
        payload = self.file.read_range(entry, low * each, high * each)
        form = stored_form(self.file, name).rows(low, high)
        return form.decode(payload, (high - low, *entry.shape[1:]))

    def weight(self, name: str, fold: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """One tensor in the basis of the checkpoint, f32 of its shape.

        `fold` f32 [intermediate] is that of the tensor's expert. Without it w2 and w3 keep the file's fold, which
        cancels in the expert's output.
        """
        return stored_form(self.file, name, fold).from_stored(self.stored(name))
