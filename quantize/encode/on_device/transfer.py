"""Values of torch's tensors between a device and the machine's memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....verify.model.device_weights import wait_for

PIECE = 1 << 24
"""Values that are copied from a GPU at a time."""


def pieces_of(values: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous f32 tensor, little-endian, piece by piece. A piece is valid until the next one is asked
    for.
    """
    for piece in _pieces(values):
        yield np.asarray(piece, "<f4").data.cast("B")


def fetched(values: Tensor) -> NDArray[np.float32]:
    """A contiguous f32 tensor in the machine's memory."""
    if values.device.type == "cpu":
        return values.numpy()
    out, at = np.empty(values.numel(), np.float32), 0
    for piece in _pieces(values):
        out[at : at + len(piece)] = piece
        at += len(piece)
    return out.reshape(values.shape)


def _pieces(values: Tensor) -> Iterator[NDArray[np.float32]]:
    """The values one after the other; from a GPU through page-locked memory, which is fastest and holds no other thread
    up.
    """
    flat = values.flatten()
    if values.device.type == "cpu":
        yield flat.numpy()
        return
    staged = torch.empty(PIECE, pin_memory=True)
    for part in torch.split(flat, PIECE):
        here = staged[: len(part)]
        here.copy_(part, non_blocking=True)
        wait_for(part.device)
        yield here.numpy()
