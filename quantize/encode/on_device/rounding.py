"""Matrices in torch to their payloads, and to the values that they stand for: on a stream of a GPU, or by any encoder
through the machine's memory. Both give the same bytes for the same factors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....formats.blocks import AffineFormat, Format, LloydFormat
from ....formats.fwht import GROUP, rotate
from ....formats.hfq.stored import StoredForm
from ....kernels.encode.device_encoder import Coded, DeviceEncoder
from ....kernels.encode.hessians import DenseFactors
from ....kernels.runtime.host import Backend, Buffer
from ....lloyd.hessian.row import RowHessian
from ....lloyd.row_blocks import RowAnswers
from ..encoders import Encoder, MatrixTask
from .beside import apart, are_alike, beside, each, factors_beside
from .factors import Factors, borrowed

U8 = NDArray[np.uint8]


Answers = tuple[tuple[slice, Tensor], ...]
"""How rows answer each other: `awq.row_answers.RowAnswers` on a device."""


@dataclass(frozen=True, eq=False)
class Under:
    """What a matrix is rounded under: what multiplies its columns, f32 [K], and the Hessian of its rows after that."""

    scale: Tensor
    hessian: Factors | RowHessian


class Rounder(Protocol):
    """Rounds matrices that lie on a device of torch's."""

    def encode(
        self, matrices: Tensor, fmt: Format, under: Sequence[Under], gain: float
    ) -> tuple[Tensor, Tensor]:
        """Of matrices f32 [n, R, K], folded already, the payloads u8 [n, bytes], where they were made, and the values
        f32 [n, R, K] that they stand for, in the stored basis.
        """
        ...

    def payloads(
        self, matrices: Tensor, fmt: Format, under: Sequence[Under], gain: float, answers: Answers | None
    ) -> Tensor:
        """The payloads alone, of matrices whose rows answer each other, where there are `answers`."""
        ...

    def fetch(self, payloads: Tensor) -> U8:
        """Payloads u8 [n, bytes] in the machine's memory."""
        ...


@dataclass(frozen=True)
class Streamed:
    """Rounds on the stream of a device's encoder, to which torch has switched."""

    encoder: DeviceEncoder

    def encode(
        self, matrices: Tensor, fmt: Format, under: Sequence[Under], gain: float
    ) -> tuple[Tensor, Tensor]:
        """As `Rounder.encode`. Nothing waits for the device. Matrices go side by side where they can."""
        if not _side_by_side(under):
            made = [self.encode(m[None], fmt, [u], gain) for m, u in zip(matrices, under, strict=True)]
            return torch.cat([payload for payload, _ in made]), torch.cat([values for _, values in made])
        count, groups = len(matrices), matrices.shape[2] // GROUP
        coded = self._coded(matrices, fmt, under, gain)
        values = _decoded(coded, fmt, matrices.device)
        return _payloads(coded, count, groups, matrices.device), apart(values, count, groups)

    def payloads(
        self, matrices: Tensor, fmt: Format, under: Sequence[Under], gain: float, answers: Answers | None
    ) -> Tensor:
        """As `Rounder.payloads`, in the way of `encode`."""
        if not _side_by_side(under):
            pairs = zip(matrices, under, strict=True)
            return torch.cat([self.payloads(m[None], fmt, [u], gain, answers) for m, u in pairs])
        coded = self._coded(matrices, fmt, under, gain, answers)
        return _payloads(coded, len(matrices), matrices.shape[2] // GROUP, matrices.device)

    def _coded(
        self,
        matrices: Tensor,
        fmt: Format,
        under: Sequence[Under],
        gain: float,
        answers: Answers | None = None,
    ) -> Coded:
        """Matrices f32 [n, R, K] side by side as the encoder holds them."""
        backend = self.encoder.backend
        weights, scale = beside(matrices), beside(torch.stack([u.scale for u in under]))
        given, columns = borrowed(backend, weights), borrowed(backend, scale)
        shares = None
        if answers is not None:
            shares = [(rows, borrowed(backend, share)) for rows, share in answers]
        return self.encoder.encode_here(
            given, fmt, columns, self._brought(under), gain, len(matrices), shares
        )

    def _brought(self, under: Sequence[Under]) -> DenseFactors | RowHessian:
        """The Hessians for the kernels."""
        if isinstance(first := under[0].hessian, RowHessian):
            return first
        return factors_beside([u.hessian for u in under if isinstance(u.hessian, Factors)]).on(
            self.encoder.backend
        )

    def fetch(self, payloads: Tensor) -> U8:
        """As `Rounder.fetch`."""
        backend = self.encoder.backend
        return backend.download(borrowed(backend, payloads.contiguous()))


@dataclass(frozen=True)
class ThroughMemory:
    """Rounds with any encoder."""

    encoder: Encoder

    def encode(
        self, matrices: Tensor, fmt: Format, under: Sequence[Under], gain: float
    ) -> tuple[Tensor, Tensor]:
        """As `Rounder.encode`."""
        payloads = self.payloads(matrices, fmt, under, gain, None)
        values = np.stack([fmt.decode(payload) for payload in self.fetch(payloads)])
        return payloads, torch.from_numpy(values.reshape(matrices.shape)).to(matrices.device)

    def payloads(
        self, matrices: Tensor, fmt: Format, under: Sequence[Under], gain: float, answers: Answers | None
    ) -> Tensor:
        """As `Rounder.payloads`."""
        shares: RowAnswers | None = None
        if answers is not None:
            shares = [(rows, share.cpu().numpy()) for rows, share in answers]

        def task(matrix: Tensor, given: Under) -> MatrixTask:
            hessian = given.hessian.on_cpu() if isinstance(given.hessian, Factors) else given.hessian
            form = StoredForm(fmt, given.scale.cpu().numpy())
            return MatrixTask(matrix.cpu().numpy(), form, "hessian", hessian, gain, answers=shares)

        done = self.encoder.encode([task(m, u) for m, u in zip(matrices, under, strict=True)])
        return torch.from_numpy(np.stack(done))

    def fetch(self, payloads: Tensor) -> U8:
        """As `Rounder.fetch`."""
        fetched: U8 = payloads.numpy()
        return fetched


def _side_by_side(under: Sequence[Under]) -> bool:
    """Whether matrices can be rounded in the same launches."""
    return len(under) == 1 or are_alike([u.hessian for u in under])


def _payloads(coded: Coded, count: int, groups: int, device: torch.device) -> Tensor:
    """The payloads u8 [count, bytes] of so many matrices of so many groups, in memory of their own."""
    rows = _tensor(coded.payload, device).clone().view(coded.codes.shape[0], -1)
    return apart(rows, count, groups).reshape(count, -1)


def on_stream(backend: Backend, device: torch.device) -> AbstractContextManager[object]:
    """torch works in the stream of a back end, so that neither waits for the other; on a CPU it always does."""
    stream = getattr(backend, "stream", 0)
    if device.type == "cpu" or not stream:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device))  # type: ignore[no-untyped-call]


def unrotated(values: Tensor) -> Tensor:
    """Values f32 [n, R, K] of the stored basis, each group of 256 columns turned back."""
    in_groups = values.view(len(values), -1, GROUP)
    back = partial(torch.mm, mat2=_back(values.device))
    return each(back, in_groups, torch.empty_like(in_groups)).view(values.shape)


@cache
def _back(device: torch.device) -> Tensor:
    return torch.from_numpy(rotate(np.eye(GROUP, dtype=np.float32)).T.copy()).to(device)


def _decoded(coded: Coded, fmt: Format, device: torch.device) -> Tensor:
    """What the codes on the device stand for, f32 [R, K]."""
    params, codes = (_tensor(buffer, device) for buffer in (coded.params, coded.codes))
    groups = codes.view(*params.shape[:2], GROUP)
    if isinstance(fmt, AffineFormat):
        values = params[..., :1] + params[..., 1:] * groups.float()
    else:
        assert isinstance(fmt, LloydFormat)
        values = params.gather(2, groups.long())
    return values.view(codes.shape)


@dataclass(frozen=True)
class _Memory:
    """A buffer as torch asks for memory that it did not take."""

    __cuda_array_interface__: dict[str, object]


def _tensor(buffer: Buffer, device: torch.device) -> Tensor:
    """A buffer as a tensor, without a copy; the buffer must outlive it."""
    if device.type == "cpu":
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address))
        return torch.from_numpy(memory.view(buffer.dtype).reshape(buffer.shape))
    where = {
        "shape": buffer.shape,
        "typestr": buffer.dtype.str,
        "data": (buffer.address, False),
        "version": 3,
    }
    return torch.as_tensor(_Memory(where), device=device)
