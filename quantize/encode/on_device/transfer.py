"""Values of torch's tensors between a device and the machine's memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....verify.model.device_weights import page_locked, wait_for

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
    out = np.empty(values.shape, np.float32)
    fetch(values, out)
    return out


def fetch(values: Tensor, out: NDArray[np.float32]) -> None:
    """Write a contiguous f32 tensor to an array of its shape, contiguous too, in the machine's memory."""
    flat, at = out.reshape(-1), 0
    for piece in _pieces(values):
        flat[at : at + len(piece)] = piece
        at += len(piece)


def sent(array: NDArray[np.float32], device: torch.device) -> Tensor:
    """A contiguous array f32 as a tensor on a device. To a GPU it goes through page-locked memory, and may lie in a
    mapped file; on a CPU it is the same memory.
    """
    if device.type == "cpu":
        return torch.from_numpy(array)
    out, flat = torch.empty(array.shape, device=device), array.reshape(-1)
    for first, part in zip(range(0, len(flat), PIECE), torch.split(out.view(-1), PIECE), strict=True):
        staged = page_locked(part.nbytes).view(torch.float32)
        np.copyto(staged.numpy(), flat[first : first + len(part)])
        part.copy_(staged, non_blocking=True)
    return out


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
