"""Who encodes matrices: the compiled loops of lloyd on the CPU, or the kernels on a GPU. Both give the same bytes.

A device has threads of its own, which opened it and run every launch; what the CPU has to do for a matrix happens on
the thread that asks. Depends on lloyd, kernels and encode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from queue import LifoQueue
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ...awq.importance import Importance
from ...formats.blocks import AffineFormat, LloydFormat
from ...formats.errors import BackendError
from ...kernels.encode.device_encoder import Encoder, HostHessian
from ...kernels.runtime.host import Backend, has_device, open_backend
from ...lloyd.constants import GROUP
from ...lloyd.hessian.group import UNUSABLE, bounded
from ...lloyd.hessian.row import RowHessian, counted
from .layer_encoder import CPU, Coder, MatrixTask, row_hessian

DEVICES = ("cpu", "cuda", "hip")
LANES = 8
"""Streams of a device: while one copies others compute, and small launches share it."""


def on_device(hessian: RowHessian | NDArray[np.float64]) -> HostHessian:
    """A Hessian as the kernels take it; from damped channel weights f64 [K] they make its factors themselves."""
    if isinstance(hessian, RowHessian):
        groups = hessian.groups
        return HostHessian(
            matrices=tuple(g.matrix for g in groups),
            feedbacks=tuple(g.feedback for g in groups),
            diagonals=tuple(g.diagonal for g in groups),
            answers=hessian.answers,
            notes=hessian.notes,
        )
    found = [bounded(hessian[i : i + GROUP]) for i in range(0, len(hessian), GROUP)]
    notes = [UNUSABLE for w in found if w is None]
    usable = [np.ones(GROUP) if w is None else w for w in found]
    return HostHessian(weights=np.stack(usable), notes=counted(notes, len(found)))


class _Lane:
    """A thread, the back end that it opened, and an encoder there."""

    def __init__(self, open_it: Callable[[], Backend]) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        try:
            self.backend = self.thread.submit(open_it).result()
            self._encoder = self.thread.submit(Encoder, self.backend).result()
        except BaseException:
            self.thread.shutdown()
            raise

    def encode(self, tasks: Sequence[MatrixTask], outs: Sequence[NDArray[np.uint8]]) -> None:
        """Write the payloads of some matrices to `outs`."""
        self.thread.submit(self._encode, tasks, outs).result()

    def _encode(self, tasks: Sequence[MatrixTask], outs: Sequence[NDArray[np.uint8]]) -> None:
        self._encoder.bring([cast(HostHessian, task.hessian) for task in tasks if task.hessian is not None])
        for task, out in zip(tasks, outs, strict=True):
            fmt = cast(LloydFormat | AffineFormat, task.fmt)
            hessian = cast(HostHessian | None, task.hessian)
            self._encoder.encode(task.weights, fmt, task.fit, task.scale, hessian, task.gain, out)

    def close(self) -> None:
        self.thread.submit(self.backend.close)
        self.thread.shutdown()


class DeviceCoder:
    """Encodes on the device of a back end, which `open_it` opens, once per lane; `reference` stays on the CPU.

    What lanes copy and compute overlaps. The lane used last is the next one, so that few threads that ask need few
    lanes' memory; for every call that runs another may wait with its matrices in page-locked memory.
    """

    def __init__(self, open_it: Callable[[], Backend], lanes: int = LANES) -> None:
        self._all: list[_Lane] = []
        try:
            for _ in range(lanes):
                self._all.append(_Lane(open_it))
        except BaseException:
            self.close()
            raise
        self.device = self._all[0].backend.device
        self._lanes: LifoQueue[_Lane] = LifoQueue()
        self._stages: LifoQueue[NDArray[np.uint8]] = LifoQueue()
        for lane in self._all:
            self._lanes.put(lane)
        for _ in range(2 * lanes):
            self._stages.put(np.empty(0, np.uint8))

    def hessian(self, importance: Importance, scale: NDArray[np.float32] | None) -> HostHessian:
        """The Hessian of the rows that see these inputs divided by scale f32 [K]."""
        if importance.moment is None:
            return on_device(importance.channel_weights(scale))
        return on_device(row_hessian(importance, scale))

    def encode(self, tasks: Sequence[MatrixTask]) -> list[NDArray[np.uint8]]:
        """Payloads u8 [bytes] of some matrices, which share the device with those of other threads."""
        if any(task.fit == "reference" for task in tasks):
            return CPU.encode(tasks)
        stage = self._stages.get()
        try:
            sizes = [(task.weights.size * 4, task.fmt.nbytes(task.weights.size)) for task in tasks]
            needed = sum(_aligned(n) for pair in sizes for n in pair)
            if len(stage) < needed:
                stage = self._all[0].thread.submit(self._all[0].backend.pinned, needed).result()
            staged, outs, at = [], [], 0
            for task, (given, payload) in zip(tasks, sizes, strict=True):
                weights = stage[at : at + given].view(np.float32).reshape(task.weights.shape)
                np.copyto(weights, task.weights)
                at += _aligned(given)
                outs.append(stage[at : at + payload])
                at += _aligned(payload)
                staged.append(replace(task, weights=weights))
            lane = self._lanes.get()
            try:
                lane.encode(staged, outs)
            finally:
                self._lanes.put(lane)
            return [out.copy() for out in outs]
        finally:
            self._stages.put(stage)

    def close(self) -> None:
        """Wait for what is under way and give the device back."""
        for lane in self._all:
            lane.close()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


@contextmanager
def open_coder(device: str) -> Iterator[Coder]:
    """The coder of `cpu`, `hip`, or `cuda`, which is either make of GPU, as in torch.

    BackendError says what is missing.
    """
    if device not in DEVICES:
        raise BackendError(f"there is no device {device!r}", hint=f"choose one of {', '.join(DEVICES)}")
    if device == "cpu":
        yield CPU
        return
    try:
        coder = DeviceCoder(lambda: _open_gpu(device))
    except BackendError as e:
        raise BackendError(
            e.problem, hint="use --device cpu, or `mq-quant doctor` to see what is here"
        ) from None
    try:
        yield coder
    finally:
        coder.close()


def _open_gpu(device: str) -> Backend:
    if device == "cuda" and not has_device("cuda") and has_device("hip"):
        device = "hip"
    return open_backend(device, own_stream=True)
