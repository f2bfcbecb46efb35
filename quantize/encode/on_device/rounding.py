"""A matrix in torch to its payload, and to the values that it stands for: on a stream of a GPU, or by any encoder
through the machine's memory. Both give the same bytes for the same factors.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
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
from ..encoders import Encoder, MatrixTask
from .factors import Factors, borrowed

U8 = NDArray[np.uint8]


class Rounder(Protocol):
    """Rounds matrices that lie on a device of torch's."""

    def encode(
        self, weights: Tensor, fmt: Format, scale: Tensor, hessian: Factors | RowHessian, gain: float
    ) -> tuple[Tensor, Tensor]:
        """The payload u8 [bytes] of weights f32 [R, K], folded already, whose columns are multiplied by scale f32 [K],
        where it was made; and the values f32 [R, K] that it stands for, in the stored basis.
        """
        ...

    def fetch(self, payload: Tensor) -> U8:
        """A payload, or several in one, in the machine's memory."""
        ...


@dataclass(frozen=True)
class Streamed:
    """Rounds on the stream of a device's encoder, to which torch has switched."""

    encoder: DeviceEncoder
    _seen: dict[Factors, DenseFactors] = field(default_factory=dict)

    def encode(
        self, weights: Tensor, fmt: Format, scale: Tensor, hessian: Factors | RowHessian, gain: float
    ) -> tuple[Tensor, Tensor]:
        """As `Rounder.encode`. Nothing waits for the device."""
        backend = self.encoder.backend
        given, columns = borrowed(backend, weights.contiguous()), borrowed(backend, scale)
        factors = self._there(hessian) if isinstance(hessian, Factors) else hessian
        coded = self.encoder.encode_here(given, fmt, columns, factors, gain)
        values = _decoded(coded, fmt, weights.device)
        return _tensor(coded.payload, weights.device).clone(), values

    def _there(self, hessian: Factors) -> DenseFactors:
        """The factors for the kernels, the same object each time: they are brought once for all blocks of a matrix."""
        if hessian not in self._seen:
            self._seen[hessian] = hessian.on(self.encoder.backend)
        return self._seen[hessian]

    def fetch(self, payload: Tensor) -> U8:
        """As `Rounder.fetch`."""
        backend = self.encoder.backend
        return backend.download(borrowed(backend, payload.contiguous()))


@dataclass(frozen=True)
class ThroughMemory:
    """Rounds with any encoder."""

    encoder: Encoder

    def encode(
        self, weights: Tensor, fmt: Format, scale: Tensor, hessian: Factors | RowHessian, gain: float
    ) -> tuple[Tensor, Tensor]:
        """As `Rounder.encode`."""
        factors = hessian.on_cpu() if isinstance(hessian, Factors) else hessian
        form = StoredForm(fmt, scale.cpu().numpy())
        (payload,) = self.encoder.encode([MatrixTask(weights.cpu().numpy(), form, "hessian", factors, gain)])
        values = torch.from_numpy(fmt.decode(payload).reshape(weights.shape))
        return torch.from_numpy(payload), values.to(weights.device)

    def fetch(self, payload: Tensor) -> U8:
        """As `Rounder.fetch`."""
        fetched: U8 = payload.numpy()
        return fetched


def on_stream(backend: Backend, device: torch.device) -> AbstractContextManager[object]:
    """torch works in the stream of a back end, so that neither waits for the other; on a CPU it always does."""
    stream = getattr(backend, "stream", 0)
    if device.type == "cpu" or not stream:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device))  # type: ignore[no-untyped-call]


def unrotated(values: Tensor) -> Tensor:
    """Values f32 [R, K] of the stored basis, each group of 256 columns turned back."""
    return (values.view(-1, GROUP) @ _back(values.device)).view(values.shape)


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
