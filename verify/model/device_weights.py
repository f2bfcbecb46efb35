"""The weights of a checkpoint on a device of torch's: FP8 codes and their scales travel as they are stored, and become
f32 there, with the bits that `Source.weight` has.

Several threads read ahead. What was read stays on the device until the layer is closed, for whoever needs it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.checkpoint.safetensors_file import TensorInfo
from ...formats.checkpoint.weights import FP8
from ...formats.minimax import ModelConfig

READERS = 8
"""Threads that read and check codes: one looks at about 1.5 GB/s, and a device takes thirty times as much."""


def wait_for(*devices: torch.device) -> None:
    """Wait until what this thread has asked of devices is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def page_locked(array: NDArray[np.generic]) -> Tensor:
    """A copy of an array in page-locked memory, from which a GPU copies without holding up other threads.

    numpy copies it: torch would take all cores for it, in each thread that asks.
    """
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    staged = torch.empty(array.shape, dtype=kind, pin_memory=True)
    np.copyto(staged.numpy(), array)
    return staged


class StoredWeights(Protocol):
    """What is asked of a source."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def config(self) -> ModelConfig: ...

    def weight(self, name: str) -> NDArray[np.float32]: ...

    def stored(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]: ...


@dataclass(frozen=True)
class DeviceMatrix:
    """An FP8 matrix on a device: codes u8 [R, C], and scales f32, one for each block of `block`."""

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    def to(self, device: torch.device) -> DeviceMatrix:
        """The same on another device, complete there."""
        if device == self.codes.device:
            return self
        moved = DeviceMatrix(self.codes.to(device), self.scales.to(device), self.block)
        wait_for(device)
        return moved

    def values(self) -> Tensor:
        """The matrix f32 [R, C]."""
        rows, columns = self.codes.shape
        scales = self.scales.repeat_interleave(self.block[0], 0)[:rows]
        out = self.codes.view(torch.float8_e4m3fn).float()
        if columns % self.block[1] == 0:
            out.view(rows, -1, self.block[1]).mul_(scales[:, :, None])
            return out
        return out.mul_(scales.repeat_interleave(self.block[1], 1)[:, :columns])


class DeviceWeights:
    """Weights of a source on a device. Safe for several threads; `tensor` is what the reference forward asks for."""

    def __init__(self, source: StoredWeights, device: torch.device, names: Sequence[str]) -> None:
        """Begin to read the FP8 matrices among `names`, in their order."""
        self._source, self._device = source, device
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        fp8 = [name for name in names if source.tensors[name].dtype == FP8]
        self._coming: dict[str, Future[DeviceMatrix]] = {n: self._pool.submit(self._read, n) for n in fp8}

    def close(self) -> None:
        """Read nothing any more, and let go of what was read."""
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()

    def tensor(self, name: str) -> Tensor:
        """A tensor f32 in the basis of the checkpoint; errors as `Source.weight`."""
        if name in self._coming:
            return self._coming[name].result().values()
        array = np.require(self._source.weight(name), requirements=["C", "W"])
        return torch.from_numpy(array).to(self._device)

    def matrix(self, name: str) -> DeviceMatrix | Tensor:
        """A matrix as it lies on the device, complete there; errors as `Source.stored`."""
        if name in self._coming:
            return self._coming[name].result()
        found = self.tensor(name)
        wait_for(self._device)
        return found

    def _read(self, name: str) -> DeviceMatrix:
        codes, scales = self._source.stored(name)
        with _own_stream(self._device):
            matrix = DeviceMatrix(
                self._sent(codes.view(np.uint8)), self._sent(scales), self._source.config.block_shape
            )
            wait_for(self._device)
        return matrix

    def _sent(self, array: NDArray[np.generic]) -> Tensor:
        if self._device.type == "cpu":
            return torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return page_locked(array).to(self._device, non_blocking=True)


def _own_stream(device: torch.device) -> torch.cuda.StreamContext | nullcontext[None]:
    """Copies of this thread beside what the device computes."""
    return (
        torch.cuda.stream(
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        )
        if device.type == "cuda"
        else nullcontext()
    )
