"""The launch interface that every back end offers: buffers, and `launch(kernel, grid, block, args, lds)`.

    with open_backend("auto") as gpu:
        x = gpu.upload(np.ones((1, 256), np.float32))
        y = gpu.alloc((1, 256), np.float32)
        gpu.launch(gpu.kernel("rmsnorm"), (1,), (256,), (y, x, weight, 256, 1e-6))
        gpu.download(y)

Launches are checked against the kernel's signature before anything runs: the number of arguments, each buffer's dtype
and back end, each scalar's range, grid and block. Launches run in order; `download` waits for them. The functions of
forward/ops.py choose grids and shapes.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...formats.errors import BackendError
from .block_table import MAX_LDS, MAX_THREADS, WAVE
from .sources import Kernel, Parameter, Sources, our_sources

_INTEGERS = {np.dtype(np.int32): (ctypes.c_int32, 31), np.dtype(np.int64): (ctypes.c_int64, 63)}


class Buffer:
    """An array in a back end's memory: `shape`, `dtype`, `nbytes`, `address`. It lives as long as it is referenced."""

    def __init__(
        self, backend: Backend, memory: Any, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.backend = backend
        self.memory = memory
        self.address = address
        self.shape = shape
        self.dtype = dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def reshape(self, *shape: int) -> Buffer:
        """The same memory under another shape of the same size."""
        if math.prod(shape) != self.size:
            raise BackendError(f"a buffer of shape {self.shape} cannot be read as {shape}")
        return Buffer(self.backend, self.memory, self.address, shape, self.dtype)

    def rows(self, start: int, stop: int) -> Buffer:
        """Rows [start, stop) of the first axis: the same memory, no copy."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise BackendError(f"rows {start}:{stop} are outside a buffer of shape {self.shape}")
        offset = start * (self.nbytes // self.shape[0] if self.shape[0] else 0)
        return Buffer(
            self.backend, self.memory, self.address + offset, (stop - start, *self.shape[1:]), self.dtype
        )


Argument = Buffer | int | float


class Backend(ABC):
    """A device that runs kernels. Subclasses say how memory is taken and how a checked launch is made."""

    name: str
    device: str
    """The device in words, for reports."""
    slices: Mapping[str, int] = MappingProxyType({})
    """By format, elements of a group that one lane multiplies, where that is not SLICE of block_table.py."""
    multiprocessors: int = 1
    """Of the device: as many blocks keep it busy if each takes all that one multiprocessor has."""

    @classmethod
    def devices(cls) -> int:
        """How many devices this machine has; 0 without a driver."""
        return 1

    @classmethod
    def available(cls) -> bool:
        """Whether this machine has the driver and a device."""
        return cls.devices() > 0

    def __init__(self, sources: Sources | None = None) -> None:
        self.sources = sources or our_sources()
        self._steps: list[Callable[[], None]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BackendError as e:
            if error is None:
                raise
            error.add_note(e.render())  # what went wrong first is what the user should see

    def kernel(self, name: str, fmt: str | None = None) -> Kernel:
        """The kernel of that name, for a block format (a name of formats.blocks) where it is built per format."""
        return self.sources.kernel(name, fmt)

    def lds_for_copies(self, kernel: Kernel) -> int:
        """Bytes of dynamic LDS to which a block of the kernel may have rows copied; 0 where nothing copies them."""
        return 0

    def alloc(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer of undefined content; BackendError where the device has too little memory."""
        kind = np.dtype(dtype)
        memory, address = self._alloc(max(1, math.prod(shape) * kind.itemsize))
        return Buffer(self, memory, address, tuple(int(n) for n in shape), kind)

    def borrowed(self, memory: Any, address: int, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer in device memory that somebody else took, and keeps as long as `memory` is referenced."""
        return Buffer(self, memory, address, tuple(int(n) for n in shape), np.dtype(dtype))

    def upload(self, array: NDArray[Any]) -> Buffer:
        """A buffer with the content, shape and dtype of `array`; no launch so far can have used it."""
        buffer = self.alloc(array.shape, array.dtype)
        self._write(buffer, array)
        return buffer

    def write(self, buffer: Buffer, array: NDArray[Any], offset: int = 0) -> None:
        """Copy `array` into a buffer of its dtype, from element `offset` of the flat buffer on."""
        self._own(buffer)
        self._refuse_while_recording("arrays are copied")
        self._write(buffer, array, offset)

    def _write(self, buffer: Buffer, array: NDArray[Any], offset: int = 0) -> None:
        if array.dtype != buffer.dtype or offset < 0 or offset + array.size > buffer.size:
            raise BackendError(
                f"{array.dtype}[{array.size}] does not fit a buffer of {buffer.dtype}[{buffer.size}] at {offset}"
            )
        if array.size:
            self._copy_in(buffer.address + offset * buffer.dtype.itemsize, np.ascontiguousarray(array))

    def download(self, buffer: Buffer, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The buffer's content, once every launch before has run; into `out`, contiguous, where it is given."""
        self._own(buffer)
        self._refuse_while_recording("arrays are copied")
        if out is None:
            out = np.empty(buffer.shape, buffer.dtype)
        elif (out.shape, out.dtype) != (buffer.shape, buffer.dtype) or not out.flags.c_contiguous:
            raise BackendError(f"{buffer.dtype}{buffer.shape} cannot be read into {out.dtype}{out.shape}")
        self.synchronize()
        if out.size:
            self._copy_out(out, buffer.address)
        return out

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory of the machine, u8 [nbytes], from and to which copies are fast; `close` gives it back."""
        return np.empty(nbytes, np.uint8)

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copy a buffer's content into another of its size and dtype."""
        self._own(target)
        self._own(source)
        if target.dtype != source.dtype or target.size != source.size:
            raise BackendError(
                f"{source.dtype}[{source.size}] cannot be copied to {target.dtype}[{target.size}]"
            )
        where = target.address, source.address, source.nbytes
        if source.nbytes:
            self._do(lambda: self._copy(*where))

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` launches and copies between buffers: none of it happens now, and all of it at each call of what
        is returned.

        The buffers must live as long. BackendError where `work` copies from arrays to buffers that were there before,
        or from buffers to arrays.
        """
        self._refuse_while_recording("another recording begins")
        steps: list[Callable[[], None]] = []
        self._steps = steps
        try:
            work()
        finally:
            self._steps = None

        def again() -> None:
            for step in steps:
                step()

        return again

    def _do(self, step: Callable[[], None]) -> None:
        """Take a step now, or keep it where steps are recorded."""
        if self._steps is None:
            step()
        else:
            self._steps.append(step)

    def _refuse_while_recording(self, what: str) -> None:
        if self._steps is not None:
            raise BackendError(f"{what} while launches are recorded")

    def launch(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        lds: int = 0,
    ) -> None:
        """Run a kernel on grid × block threads with `lds` bytes of dynamic LDS; a grid with a zero runs nothing.

        BackendError where anything does not fit the kernel.
        """
        if len(args) != len(kernel.parameters):
            names = ", ".join(p.name for p in kernel.parameters)
            raise BackendError(f"kernel {kernel.label} takes ({names}), and was given {len(args)} arguments")
        values = [self._value(kernel, p, a) for p, a in zip(kernel.parameters, args, strict=True)]
        full_grid, full_block = _three(kernel, "grid", grid), _three(kernel, "block", block)
        threads = math.prod(full_block)
        if threads % WAVE or not 0 < threads <= min(kernel.threads, MAX_THREADS):
            raise BackendError(
                f"kernel {kernel.label} runs in blocks of whole waves of {WAVE} up to {kernel.threads} threads,"
                f" not {threads}"
            )
        if lds < 0 or (lds > MAX_LDS and lds > self.lds_for_copies(kernel)):
            raise BackendError(f"kernel {kernel.label} was given {lds} bytes of LDS, of {MAX_LDS}")
        if math.prod(full_grid):
            self._ready(kernel)
            self._do(lambda: self._dispatch(kernel, full_grid, full_block, values, lds))

    def _ready(self, kernel: Kernel) -> None:  # noqa: B027
        """Have a kernel's code on the device, where that takes a step of its own."""

    def _value(self, kernel: Kernel, parameter: Parameter, value: Argument) -> Any:
        if parameter.pointer:
            if not isinstance(value, Buffer):
                raise _wrong(kernel, parameter, f"buffer, not {type(value).__name__}")
            self._own(value)
            if value.dtype != parameter.dtype:
                raise _wrong(kernel, parameter, f"buffer, not {value.dtype}")
            return ctypes.c_void_p(value.address)
        if isinstance(value, (Buffer, bool)) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise _wrong(kernel, parameter, f", not {type(value).__name__}")
        if parameter.dtype in _INTEGERS:
            if not isinstance(value, (int, np.integer)):
                raise _wrong(kernel, parameter, f", not {value!r}")
            kind, bits = _INTEGERS[parameter.dtype]
            if not -(2**bits) <= value < 2**bits:
                raise _wrong(kernel, parameter, f", which {value} does not fit")
            return kind(int(value))
        return ctypes.c_float(float(value))

    def _own(self, buffer: Buffer) -> None:
        if buffer.backend is not self:
            raise BackendError(f"a buffer of back end {buffer.backend.name} was given to {self.name}")

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for every launch so far; BackendError where one failed."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the back end holds; its buffers must not be used afterwards."""

    @abstractmethod
    def _alloc(self, nbytes: int) -> tuple[Any, int]:
        """(owner of the memory, its address)."""

    @abstractmethod
    def mark(self) -> Any:
        """A point in the sequence of launches, for `seconds_between`."""

    @abstractmethod
    def seconds_between(self, first: Any, last: Any) -> float:
        """Seconds of device time between two marks; waits for the last one."""

    @abstractmethod
    def _copy(self, target: int, source: int, nbytes: int) -> None: ...

    @abstractmethod
    def _copy_in(self, address: int, array: NDArray[Any]) -> None: ...

    @abstractmethod
    def _copy_out(self, array: NDArray[Any], address: int) -> None: ...

    @abstractmethod
    def _dispatch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: Sequence[Any],
        lds: int,
    ) -> None: ...


def _wrong(kernel: Kernel, parameter: Parameter, rest: str) -> BackendError:
    separator = "" if rest.startswith(",") else " "
    return BackendError(
        f"argument {parameter.name} of kernel {kernel.label} is a {parameter.dtype}{separator}{rest}"
    )


def _three(kernel: Kernel, what: str, dims: Sequence[int]) -> tuple[int, int, int]:
    limits = (2**31 - 1, 65535, 65535)
    full = (*dims, 1, 1, 1)[: max(3, len(dims))]
    if len(full) != 3 or any(not 0 <= n <= limit for n, limit in zip(full, limits, strict=False)):
        raise BackendError(f"kernel {kernel.label} cannot run on {what} {tuple(dims)}")
    return int(full[0]), int(full[1]), int(full[2])


def arguments(values: Sequence[Any]) -> Any:
    """The array of pointers to argument values that launch calls take; `values` must outlive it."""
    return (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))


BACKENDS = {"hip": ".hip:HipBackend", "cuda": ".cuda:CudaBackend", "cpu": ".cpu:CpuBackend"}
"""Back ends by name, in the order in which `auto` tries them."""


def open_backend(name: str = "auto", **options: Any) -> Backend:
    """Open a back end: "hip" (AMD GPU), "cuda" (NVIDIA GPU), "cpu", or "auto", the first that has a device.

    `options` go to the back end's class: `sources` to any; `threads` and `order` to the CPU's, `own_stream` and
    `index`, the number of the GPU, to those of GPUs. Raises BackendError that says what is missing.
    """
    if name == "auto":
        for candidate in ("hip", "cuda"):
            kind = _load(candidate)
            if kind.available():
                return kind(sources=options.get("sources"))
        name = "cpu"
    return _load(name)(**options)


def devices(name: str) -> int:
    """How many devices the back end of that name has here; 0 without a driver."""
    return _load(name).devices()


def _load(name: str) -> type[Backend]:
    if name not in BACKENDS:
        raise BackendError(
            f"there is no back end {name!r}", hint=f"choose one of auto, {', '.join(BACKENDS)}"
        )
    module, attribute = BACKENDS[name].split(":")
    kind: type[Backend] = getattr(importlib.import_module(module, __package__), attribute)
    return kind
