"""The weights of a checkpoint on devices of torch's: FP8 codes and their scales travel as they are stored, and become
f32 there, with the bits that `Source.weight` has.

Several threads read ahead. What was read stays where it is until the layer is closed, for whoever needs it again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.checkpoint.safetensors_file import TensorInfo
from ...formats.checkpoint.weights import FP8
from ...formats.minimax import ModelConfig, expert_of

READERS = 8
"""Threads that read and check codes: one looks at about 1.5 GB/s, and a device takes thirty times as much."""
TOGETHER = 48 << 20
"""Bytes of codes that a thread reads and sends at once. Each call into torch hands the interpreter on, and threads that
wait for their turn leave the device idle: read one by one, the matrices of a layer held up all threads for a second.
"""
ALIGNMENT = 256
"""Bytes to which the places of codes and scales are aligned where they are sent."""


def wait_for(*devices: torch.device) -> None:
    """Wait until what this thread has asked of devices is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def brought(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device. Torch is not called where they lie there: each call hands the interpreter on."""
    return values if values.device == device else values.to(device)


def all_brought(values: Mapping[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    """Values [n, ...] on a device, by their keys. Those of another device travel in one piece: for each copy the two
    wait for each other.
    """
    found: dict[int, Tensor] = {}
    for keys in by_device(values):
        parts = [values[key] for key in keys]
        if parts[0].device != device and len(parts) > 1:
            parts = [*torch.split(torch.cat(parts).to(device), [len(part) for part in parts])]
        found |= {key: brought(part, device) for key, part in zip(keys, parts, strict=True)}
    return found


def by_device(values: Mapping[int, Tensor]) -> Iterable[list[int]]:
    """The keys of values that lie on one device, for each device."""
    found: dict[torch.device, list[int]] = defaultdict(list)
    for key, value in values.items():
        found[value.device].append(key)
    return found.values()


def page_locked(nbytes: int) -> Tensor:
    """Page-locked memory u8 [nbytes], from which a GPU copies without holding up other threads.

    To be filled by numpy: torch would take all cores for it, in each thread that asks.
    """
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


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
    """An FP8 matrix on a device, or several beside each other: codes u8 [..., R, C], and scales f32, one for each block
    of `block`.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    def to(self, device: torch.device) -> DeviceMatrix:
        """The same on a device, for what this thread asks of it next."""
        return DeviceMatrix(brought(self.codes, device), brought(self.scales, device), self.block)

    def values(self) -> Tensor:
        """The values f32 [..., R, C]."""
        (*some, rows, columns), (high, wide) = self.codes.shape, self.block
        out = self.codes.view(torch.float8_e4m3fn).float()
        if rows % high == 0 and columns % wide == 0:
            of_blocks = self.scales.reshape(*some, rows // high, 1, columns // wide, 1)
            out.view(*some, rows // high, high, columns // wide, wide).mul_(of_blocks)
            return out
        scales = self.scales.repeat_interleave(high, -2)[..., :rows, :]
        return out.mul_(scales.repeat_interleave(wide, -1)[..., :columns])


def values_of(matrices: Sequence[DeviceMatrix]) -> Sequence[Tensor]:
    """The values f32 [R, C] of matrices of one shape on one device, which pieces of one tensor hold: in as many calls
    into torch as those of one matrix take.
    """
    codes, scales = (
        torch.stack(parts) for parts in zip(*((m.codes, m.scales) for m in matrices), strict=True)
    )
    return DeviceMatrix(codes, scales, matrices[0].block).values().unbind()


class DeviceWeights:
    """Weights of a source on devices: those of experts on all of them in turns, all others on the first. Safe for
    several threads; `tensor` is what the reference forward asks for.
    """

    def __init__(self, source: StoredWeights, devices: Sequence[torch.device], names: Sequence[str]) -> None:
        """Begin to read what lies in `names` but experts in other formats than FP8: first what is small, then FP8
        matrices in their order, some at a time.
        """
        self.devices = tuple(devices)
        self._source = source
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._coming: dict[str, Future[dict[str, DeviceMatrix]]] = {}
        stored = {n: source.tensors[n] for n in names if source.tensors[n].dtype == FP8}
        others = (n for n in names if n not in stored and expert_of(n) is None)
        self._others = {name: self._pool.submit(source.weight, name) for name in others}
        for place, some in _some_at_a_time(stored, self._place):
            self._coming |= dict.fromkeys(some, self._pool.submit(self._read, some, self.devices[place]))

    def place(self, expert: int) -> int:
        """The number of the device on which the matrices of an expert lie."""
        return expert % len(self.devices)

    def _place(self, name: str) -> int:
        found = expert_of(name)
        return 0 if found is None else self.place(found[1])

    def close(self) -> None:
        """Read nothing any more, and let go of what was read."""
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()
        self._others.clear()

    def tensor(self, name: str) -> Tensor:
        """A tensor f32 in the basis of the checkpoint; errors as `Source.weight`."""
        if name in self._coming:
            return self._coming[name].result()[name].values()
        values = self._others[name].result() if name in self._others else self._source.weight(name)
        array = np.require(values, requirements=["C", "W"])
        return torch.from_numpy(array).to(self.devices[self._place(name)])

    def tensors_of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors as `tensor` gives them. FP8 matrices of one shape that lie on one device become f32 together."""
        alike: dict[tuple[torch.device, torch.Size], dict[str, DeviceMatrix]] = defaultdict(dict)
        found = {}
        for name in names:
            if name in self._coming:
                matrix = self._coming[name].result()[name]
                alike[matrix.codes.device, matrix.codes.shape][name] = matrix
            else:
                found[name] = self.tensor(name)
        for some in alike.values():
            found |= zip(some, values_of([*some.values()]), strict=True)
        return found

    def matrix(self, name: str) -> DeviceMatrix | Tensor:
        """A matrix as it lies on its device, complete there; errors as `Source.stored`."""
        if name in self._coming:
            return self._coming[name].result()[name]
        found = self.tensor(name)
        wait_for(found.device)
        return found

    def _read(self, names: Sequence[str], device: torch.device) -> dict[str, DeviceMatrix]:
        """Read some matrices, and send their codes and scales in one copy."""
        stored = [self._source.stored(name) for name in names]
        with _own_stream(device):
            there = _sent(
                [part for codes, scales in stored for part in (codes.view(np.uint8), scales)], device
            )
            wait_for(device)
        pairs = zip(there[::2], there[1::2], strict=True)
        block = self._source.config.block_shape
        return {
            n: DeviceMatrix(codes, scales, block) for n, (codes, scales) in zip(names, pairs, strict=True)
        }


def _some_at_a_time(
    infos: Mapping[str, TensorInfo], place: Callable[[str], int]
) -> Iterator[tuple[int, list[str]]]:
    """A place, and names of matrices of about TOGETHER bytes that belong there, each time."""
    some: dict[int, list[str]] = defaultdict(list)
    sizes: dict[int, int] = defaultdict(int)
    for name, info in infos.items():
        some[at := place(name)].append(name)
        sizes[at] += math.prod(info.shape)
        if sizes[at] >= TOGETHER:
            yield at, some.pop(at)
            del sizes[at]
    yield from some.items()


def _sent(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays u8 and f32 on a device, through one piece of page-locked memory where that is a GPU."""
    if device.type == "cpu":
        return [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]
    staged = page_locked(places(arrays)[-1])
    lay_out(arrays, staged.numpy())
    return laid_out(arrays, staged.to(device, non_blocking=True))


def places(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Where each of some arrays begins in memory that holds them all, and how many bytes that has."""
    return [0, *np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]).tolist()]


def lay_out(arrays: Sequence[NDArray[Any]], memory: NDArray[np.uint8]) -> None:
    """Write arrays to their places in memory."""
    for start, array in zip(places(arrays), arrays, strict=False):
        np.copyto(memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)


def laid_out(arrays: Sequence[NDArray[Any]], memory: Tensor) -> list[Tensor]:
    """The arrays u8 and f32 that were laid out in memory u8, as tensors there."""
    of_kind = {1: memory, 4: memory.view(torch.float32)}
    return [
        of_kind[array.itemsize].as_strided(array.shape, _row_major(array.shape), start // array.itemsize)
        for start, array in zip(places(arrays), arrays, strict=False)
    ]


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, counted in values."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _own_stream(device: torch.device) -> torch.cuda.StreamContext | nullcontext[None]:
    """Copies of this thread beside what the device computes."""
    return (
        torch.cuda.stream(
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        )
        if device.type == "cuda"
        else nullcontext()
    )
