"""What the hip and cuda back ends share: their drivers and run-time compilers differ in the names of functions only.

A `Driver` names a vendor's functions. `GpuBackend` calls them: it runs kernels in order on one device, on its
default stream or, beside other back ends, on a stream of its own. A back end is used from the thread that opened it.
"""

from __future__ import annotations

import ctypes
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import BackendError
from .drivers import Driver, Library, device_count, load_library
from .host import Backend, arguments
from .sources import Kernel, Module, Sources

_POOLED = 1 << 20
"""Bytes of a buffer up to which its memory is kept for later buffers."""
_SMALLEST = 512
"""Bytes of the smallest piece of memory that is taken."""
_NON_BLOCKING = 1  # …StreamNonBlocking: the stream does not wait for the default stream
_PORTABLE = 1  # …HostAllocPortable: page-locked for all contexts
_THIS_THREAD = 1  # …StreamCaptureModeThreadLocal: other threads may take memory meanwhile


@dataclass(frozen=True)
class Compiler:
    """The names of a vendor's run-time compiler: `prefix`CreateProgram and so on, and the calls that give the code."""

    name: str
    libraries: tuple[str, ...]
    prefix: str
    code_size: str
    code: str


def compile_program(
    compiler: Compiler,
    library: Library,
    label: str,
    text: str,
    headers: dict[str, str],
    options: Sequence[str],
) -> tuple[bytes, str]:
    """(code, log) of a source compiled at run time; BackendError with the compiler's log where it does not compile."""

    def call(name: str, *args: Any) -> int:
        return library.call(compiler.prefix + name, *args)

    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    count = len(headers)
    bodies = (ctypes.c_char_p * count)(*(h.encode() for h in headers.values()))
    names = (ctypes.c_char_p * count)(*(n.encode() for n in headers))
    file = label.replace(":", ".").encode()
    if call("CreateProgram", ctypes.byref(program), text.encode(), file, ctypes.c_int(count), bodies, names):
        raise BackendError(f"{compiler.name} takes no program", hint="its library may be broken")
    try:
        flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = call("CompileProgram", program, ctypes.c_int(len(options)), flags)
        call("GetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(max(1, size.value))
        call("GetProgramLog", program, log)
        said = log.value.decode(errors="replace").strip()
        if failed:
            raise BackendError(f"{label} does not compile with {compiler.name}:\n{said[-4000:]}")
        if call(compiler.code_size, program, ctypes.byref(size)):
            raise BackendError(f"{compiler.name} gave no code for {label}")
        code = ctypes.create_string_buffer(size.value)
        call(compiler.code, program, code)
        return code.raw, said
    finally:
        call("DestroyProgram", ctypes.byref(program))


class _Allocation:
    """Owner of one piece of device memory, whose finalizer gives the memory back."""


class GpuBackend(Backend):
    """A GPU behind a vendor's driver. Subclasses choose the device and compile modules for it."""

    driver: Driver

    def __init__(
        self,
        sources: Sources | None = None,
        own_stream: bool = False,
        index: int = 0,
        make_room: Callable[[], None] | None = None,
    ) -> None:
        """`make_room` gives back what else of this process holds memory of the device in reserve; it is called where
        the device has too little.
        """
        super().__init__(sources)
        self._make_room = make_room
        self.index = index
        library = load_library(self.driver.libraries)
        if library is None:
            raise BackendError(
                f"the {self.name} back end finds no driver: {self.driver.libraries[0]} does not load",
                hint=f"install the {self.driver.vendor} driver, or use --backend cpu",
            )
        self.library = library
        self._pool: dict[int, list[int]] = {}
        self._held: dict[int, int] = {}
        self._pinned: list[ctypes.c_void_p] = []
        self._functions: dict[Kernel, ctypes.c_void_p] = {}
        self._modules: dict[Module, ctypes.c_void_p] = {}
        self._events: list[ctypes.c_void_p] = []
        self._graphs: list[ctypes.c_void_p] = []
        self._stream = ctypes.c_void_p(None)
        self.call(self.driver.init, ctypes.c_uint(0))
        count = ctypes.c_int(0)
        status = library.call(self.driver.count, ctypes.byref(count))
        if status or count.value == 0:
            raise BackendError(
                f"the {self.name} back end finds no {self.driver.vendor} GPU", hint="use --backend cpu"
            )
        self._select()
        if own_stream:
            self.call(self.driver.stream, ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))

    @property
    def stream(self) -> int:
        """The driver's handle of the stream in which everything runs; 0 is the default stream."""
        return self._stream.value or 0

    @classmethod
    def devices(cls) -> int:
        """How many devices the driver sees; 0 without a driver."""
        return device_count(cls.driver)

    @abstractmethod
    def _select(self) -> None:
        """Make the device of number `index` current on this thread and set `device`."""

    @abstractmethod
    def _compile(self, module: Module) -> bytes:
        """The module's code for the device."""

    def call(self, name: str, *args: Any) -> None:
        """Call a driver function; BackendError in the driver's words where it fails."""
        status = self.library.call(name, *args)
        if status:
            raise BackendError(f"{name} failed on {self._device_name()}: {self._explain(status)} ({status})")

    def _device_name(self) -> str:
        return getattr(self, "device", f"the {self.driver.vendor} GPU")

    def _explain(self, status: int) -> str:
        explain = self.library.function(self.driver.error)
        if self.driver.error == "cuGetErrorString":
            text = ctypes.c_char_p()
            explain(ctypes.c_int(status), ctypes.byref(text))
            return (text.value or b"unknown error").decode()
        explain.restype = ctypes.c_char_p
        return (explain(ctypes.c_int(status)) or b"unknown error").decode()

    def _ready(self, kernel: Kernel) -> None:
        self._function(kernel)

    def _function(self, kernel: Kernel) -> ctypes.c_void_p:
        function = self._functions.get(kernel)
        if function is None:
            if kernel.module not in self._modules:
                handle = ctypes.c_void_p()
                self.call(self.driver.load, ctypes.byref(handle), self._compile(kernel.module))
                self._modules[kernel.module] = handle
            function = ctypes.c_void_p()
            module = self._modules[kernel.module]
            self.call(self.driver.function, ctypes.byref(function), module, kernel.name.encode())
            self._functions[kernel] = function
        return function

    def _alloc(self, nbytes: int) -> tuple[Any, int]:
        size = max(_SMALLEST, 1 << (nbytes - 1).bit_length()) if nbytes <= _POOLED else nbytes
        if idle := self._pool.get(size):
            address = idle.pop()
        else:
            address = self._taken(size)
            self._held[address] = size
        owner = _Allocation()
        weakref.finalize(owner, self._release, address).atexit = False
        return owner, address

    def _taken(self, size: int) -> int:
        """The address of so many bytes of the device's memory."""
        pointer = ctypes.c_void_p()
        taking = (self.driver.alloc, ctypes.byref(pointer), ctypes.c_size_t(size))
        status = self.library.call(*taking)
        if status and self._make_room is not None:
            self._make_room()
            status = self.library.call(*taking)
        if status:
            raise BackendError(
                f"{self._device_name()} has no {size:,} bytes of memory left: {self._explain(status)} ({status})",
                hint="close what else uses the GPU, or calibrate on fewer tokens",
            )
        return int(pointer.value or 0)

    def _release(self, address: int) -> None:
        """Free a piece of memory; keep a small one for the next buffer, which need not wait in one stream."""
        size = self._held.get(address)
        if size is None:
            return
        if size <= _POOLED:
            self._pool.setdefault(size, []).append(address)
        else:
            del self._held[address]
            self.call(self.driver.free, ctypes.c_void_p(address))

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked memory; BackendError where the machine gives no more of it."""
        pointer = ctypes.c_void_p()
        self.call(
            self.driver.host_alloc, ctypes.byref(pointer), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE)
        )
        self._pinned.append(pointer)
        memory: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * nbytes).from_address(pointer.value or 0)
        )
        return memory

    def mark(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self.call(self.driver.event, ctypes.byref(event), ctypes.c_uint(0))
        self._events.append(event)
        self.call(self.driver.record, event, self._stream)
        return event

    def seconds_between(self, first: ctypes.c_void_p, last: ctypes.c_void_p) -> float:
        milliseconds = ctypes.c_float()
        self.call(self.driver.wait, last)
        self.call(self.driver.elapsed, ctypes.byref(milliseconds), first, last)
        return milliseconds.value / 1000

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As `Backend.record` says: one graph, which the driver launches at once. The default stream keeps a list.

        The steps are listed first, which loads code and takes memory: neither can be done while the driver records.
        """
        if self._stream.value is None:
            return super().record(work)
        d, graph, ready = self.driver, ctypes.c_void_p(), ctypes.c_void_p()
        steps = super().record(work)
        self.call(d.capture, self._stream, ctypes.c_int(_THIS_THREAD))
        try:
            steps()
        finally:
            self.call(d.capture_end, self._stream, ctypes.byref(graph))
        try:
            self.call(d.graph, ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        finally:
            self.call(d.graph_destroy, graph)
        self._graphs.append(ready)
        return lambda: self.call(d.graph_launch, ready, self._stream)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        where = (ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(nbytes))
        if self._stream.value is None:
            self.call(self.driver.copy, *where)
        else:
            self.call(self.driver.stream_copy, *where, self._stream)

    def _copy_in(self, address: int, array: NDArray[Any]) -> None:
        where = (ctypes.c_void_p(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        self._transfer(self.driver.copy_in, self.driver.stream_copy_in, *where)

    def _copy_out(self, array: NDArray[Any], address: int) -> None:
        where = (ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(address), ctypes.c_size_t(array.nbytes))
        self._transfer(self.driver.copy_out, self.driver.stream_copy_out, *where)

    def _transfer(self, plain: str, on_stream: str, *where: Any) -> None:
        """One copy, which is done when this returns. On a stream of its own it does not wait for other streams."""
        if self._stream.value is None:
            self.call(plain, *where)
        else:
            self.call(on_stream, *where, self._stream)
            self.synchronize()

    def _dispatch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: Sequence[Any],
        lds: int,
    ) -> None:
        dims = [ctypes.c_uint(n) for n in (*grid, *block, lds)]
        none = ctypes.c_void_p(None)
        self.call(self.driver.launch, self._function(kernel), *dims, self._stream, arguments(values), none)

    def synchronize(self) -> None:
        if self._stream.value is None:
            self.call(self.driver.synchronize)
        else:
            self.call(self.driver.stream_wait, self._stream)

    def close(self) -> None:
        """Give everything back, whatever fails on the way; then raise the first error, in the driver's words."""
        held = [ctypes.c_void_p(address) for address in self._held]
        streams = [self._stream] if self._stream.value is not None else []
        owned = (
            (self.driver.stream_wait, [self._stream]),
            (self.driver.graph_code_destroy, self._graphs),
            (self.driver.free, held),
            (self.driver.host_free, self._pinned),
            (self.driver.event_destroy, self._events),
            (self.driver.unload, list(self._modules.values())),
            (self.driver.stream_destroy, streams),
        )
        self._held, self._pool, self._pinned, self._events, self._graphs = {}, {}, [], [], []
        self._functions, self._modules, self._stream = {}, {}, ctypes.c_void_p(None)
        errors = [
            error for destroy, things in owned for thing in things if (error := self._failure(destroy, thing))
        ]
        if errors:
            raise errors[0]

    def _failure(self, name: str, *args: Any) -> BackendError | None:
        """Call a driver function; the error where it fails."""
        try:
            self.call(name, *args)
        except BackendError as e:
            return e
        return None
