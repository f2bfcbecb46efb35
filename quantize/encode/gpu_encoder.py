"""The encoder on one GPU or several: command streams, each with a thread of its own.

While one stream copies, another one computes. What the CPU has to do for a matrix happens on the thread that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import LifoQueue
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...kernels.encode.device_encoder import DeviceEncoder
from ...kernels.runtime.drivers import gpu_memory
from ...kernels.runtime.host import Backend, devices, open_backend
from ..spec.calibration_sizes import GPU_STREAMS, gpu_streams
from .encoders import CPU, MatrixTask

U8 = NDArray[np.uint8]
T = TypeVar("T")

ALIGNMENT = 256
"""Bytes to which the places of matrices and payloads in page-locked memory are aligned."""


class _Stream:
    """A thread, the back end that it opened, and the encoder of that back end. Every launch runs on the thread.

    `place` is the number of its device among those of the encoder.
    """

    def __init__(self, open_it: Callable[[], Backend]) -> None:
        self.place = 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        try:
            self.backend = self.thread.submit(open_it).result()
            self._encoder = self.thread.submit(DeviceEncoder, self.backend).result()
        except BaseException:
            self.thread.shutdown()
            raise

    def pinned(self, nbytes: int) -> U8:
        """Page-locked memory u8 [nbytes] that every stream of the device can copy from and to."""
        return self.thread.submit(self.backend.pinned, nbytes).result()

    def encode(self, tasks: Sequence[MatrixTask], outs: Sequence[U8]) -> None:
        """Write the payloads of some matrices to `outs`, and return when they are there."""
        self.thread.submit(self._encode, tasks, outs).result()

    def _encode(self, tasks: Sequence[MatrixTask], outs: Sequence[U8]) -> None:
        self._encoder.bring([task.hessian for task in tasks if task.hessian is not None])
        for task, out in zip(tasks, outs, strict=True):
            self._encoder.encode(
                task.weights, task.form, task.fit, task.hessian, task.gain, out, task.answers
            )

    def run(self, work: Callable[[DeviceEncoder], T]) -> T:
        """What some work returns that is done on the stream's thread with its encoder."""
        return self.thread.submit(work, self._encoder).result()

    def close(self) -> BaseException | None:
        """Give back what the stream holds; the error where that fails."""
        done = self.thread.submit(self.backend.close)
        self.thread.shutdown()
        return done.exception()


class GpuEncoder:
    """Encodes on one device or several; each of `opens` opens the back end of one, once for each of its `streams`.
    Devices of another kind than the first one take no part. The fit `reference` runs on the CPU.

    Work goes to the stream that was used last of those that are free, so that few threads that ask need the memory of
    few streams, and a device that has other work to do gets less of this. For every call that runs, another one may
    wait with its matrices in page-locked memory.
    """

    def __init__(self, *opens: Callable[[], Backend], streams: int = GPU_STREAMS) -> None:
        self._all: list[_Stream] = []
        try:
            alike = [open_it for open_it in opens if self._add(open_it)]
            for _ in range(1, streams):
                for open_it in alike:
                    self._add(open_it)
        except BaseException:
            self._give_back()
            raise
        self._free: LifoQueue[_Stream] = LifoQueue()
        for n, stream in enumerate(self._all):
            stream.place = n % len(alike)
            self._free.put(stream)
        first = self._all[0].backend.device
        self.device = first if len(alike) == 1 else f"{len(alike)} × {first}"
        self._stages: LifoQueue[U8] = LifoQueue()
        for _ in range(2 * len(self._all)):
            self._stages.put(np.empty(0, np.uint8))

    def _add(self, open_it: Callable[[], Backend]) -> bool:
        """Open another stream; whether its device is of the first one's kind, without which it is closed again."""
        stream = _Stream(open_it)
        self._all.append(stream)
        if stream.backend.device == self._all[0].backend.device:
            return True
        self._all.pop().close()
        return False

    def encode(self, tasks: Sequence[MatrixTask]) -> list[U8]:
        """As `Encoder.encode` says. The matrices of one call go to one stream."""
        if any(task.fit == "reference" for task in tasks):
            return CPU.encode(tasks)
        stage = self._stages.get()
        try:
            needed = sum(_aligned(task.weights.size * 4) + _aligned(_payload_bytes(task)) for task in tasks)
            if len(stage) < needed:
                stage = self._all[0].pinned(needed)
            staged, outs = _staged(tasks, stage)
            with self._stream() as stream:
                stream.encode(staged, outs)
            return [out.copy() for out in outs]
        finally:
            self._stages.put(stage)

    def on_stream(self, work: Callable[[DeviceEncoder, int], T]) -> T:
        """What some work returns that launches kernels itself, with the encoder of the stream that is free next, and
        the number of its device among those of the encoder.
        """
        with self._stream() as stream:
            return stream.run(lambda encoder: work(encoder, stream.place))

    @contextmanager
    def _stream(self) -> Iterator[_Stream]:
        stream = self._free.get()
        try:
            yield stream
        finally:
            self._free.put(stream)

    def close(self) -> None:
        """Wait for what is under way and give the device back; then raise the first error of that."""
        if errors := self._give_back():
            raise errors[0]

    def _give_back(self) -> list[BaseException]:
        return [error for stream in self._all if (error := stream.close()) is not None]


def _staged(tasks: Sequence[MatrixTask], stage: U8) -> tuple[list[MatrixTask], list[U8]]:
    """The tasks with their weights, already folded, in page-locked memory, and places for their payloads there."""
    staged, outs, at = [], [], 0
    for task in tasks:
        given, payload = task.weights.size * 4, _payload_bytes(task)
        weights = stage[at : at + given].view(np.float32).reshape(task.weights.shape)
        np.copyto(weights, task.form.folded(task.weights))
        at += _aligned(given)
        outs.append(stage[at : at + payload])
        at += _aligned(payload)
        staged.append(replace(task, weights=weights, form=replace(task.form, fold=None)))
    return staged, outs


def _payload_bytes(task: MatrixTask) -> int:
    return task.form.format.nbytes(task.weights.size)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def open_gpu(device: str, own_stream: bool = True, index: int = 0) -> Backend:
    """The back end of `hip`, or of `cuda`, which is HIP's where there is only an AMD GPU, for the GPU of this number;
    BackendError without one.
    """
    return open_backend(_vendor(device), own_stream=own_stream, index=index, make_room=give_back_reserve)


def give_back_reserve() -> None:
    """Give back what torch holds of the GPUs' memory for tensors to come."""
    import torch  # here, since that takes a second and only a GPU that is full needs it

    torch.cuda.empty_cache()


def open_gpus(device: str) -> GpuEncoder:
    """The encoder of all GPUs of `hip` or `cuda` that are of the first one's kind, or of one by its number, as in
    `cuda:1`; BackendError without one.
    """
    name, _, number = device.partition(":")
    found = [int(number)] if number else range(max(1, devices(_vendor(name))))
    opens = (partial(open_gpu, name, index=n) for n in found)
    return GpuEncoder(*opens, streams=gpu_streams(gpu_memory()))


def _vendor(device: str) -> str:
    return "hip" if device == "cuda" and not devices("cuda") and devices("hip") else device
