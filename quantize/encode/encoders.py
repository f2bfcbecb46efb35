"""Who encodes matrices: the compiled loops of lloyd on the CPU, or kernels on a GPU. Both give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import BackendError
from ...formats.hfq.stored import StoredForm
from ...lloyd.encode import Fit, encode_rotated
from ...lloyd.hessian.row import RowHessian
from ...lloyd.row_blocks import RowAnswers, encode_blocks

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

DEVICES = ("cpu", "cuda", "hip")


@dataclass(frozen=True)
class MatrixTask:
    """A matrix to be encoded: weights f32 [R, K] as in the checkpoint, K a multiple of 256, and the form to store.

    `hessian` is that of the rows in the stored basis, for the fit `hessian`; without one that fit is `exact`. `gain`
    is how far levels go from least squares, 0, to unbiased ones, 1. `stored` gives what `form.to_stored` makes of the
    weights, where several tasks have that in common; it is asked only where that is done on the CPU. `answers` say how
    the rows answer each other under a Hessian, None where they do not; nothing is folded then.
    """

    weights: F32
    form: StoredForm
    fit: Fit
    hessian: RowHessian | None = None
    gain: float = 0.0
    stored: Callable[[], F32] | None = None
    answers: RowAnswers | None = None


class Encoder(Protocol):
    """Encodes matrices, for any number of threads at a time."""

    @property
    def device(self) -> str:
        """What does the work, in words for reports."""
        ...

    def encode(self, tasks: Sequence[MatrixTask]) -> list[U8]:
        """For each task the payload u8 [R · K / 256 · group_bytes]; the same bytes from every encoder.

        Raises WeightError where a K is no multiple of 256, TypeError where a format has no rotation.
        """
        ...


class CpuEncoder:
    """Encodes on the thread that asks."""

    device = "cpu"

    def encode(self, tasks: Sequence[MatrixTask]) -> list[U8]:
        """As `Encoder.encode` says."""
        return [encode_matrix(task) for task in tasks]


CPU = CpuEncoder()


def encode_matrix(task: MatrixTask) -> U8:
    """The payload u8 [R · K / 256 · group_bytes] of one matrix, encoded by the loops of lloyd."""
    rows = task.form.to_stored(task.weights) if task.stored is None else task.stored()
    given = task.form.format, task.fit, task.hessian, task.gain
    return encode_rotated(rows, *given) if task.answers is None else encode_blocks(rows, task.answers, *given)


def torch_device(device: str, asked: bool) -> str:
    """Where torch runs the model beside an encoder on `device`: `cuda` for either make of GPU, or `cpu`.

    Unless the device was asked for, it is the CPU where torch sees no GPU.
    """
    if device == "cpu" or asked:
        return "cpu" if device == "cpu" else "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def open_encoder(device: str) -> Iterator[Encoder]:
    """The encoder of `cpu`, `hip`, or `cuda`, which means either make of GPU, as it does in torch. All GPUs of one kind
    take part, or the one of a number, as in `cuda:1`.

    Raises BackendError that says what is missing.
    """
    if device.partition(":")[0] not in DEVICES:
        raise BackendError(f"there is no device {device!r}", hint=f"choose one of {', '.join(DEVICES)}")
    if device == "cpu":
        yield CPU
        return
    from .gpu_encoder import open_gpus

    try:
        encoder = open_gpus(device)
    except BackendError as e:
        raise BackendError(
            e.problem, hint="use --device cpu, or `mq-quant doctor` to see what is here"
        ) from None
    try:
        yield encoder
    except BaseException:
        with suppress(BackendError):  # the error that came first is the one to show
            encoder.close()
        raise
    encoder.close()
