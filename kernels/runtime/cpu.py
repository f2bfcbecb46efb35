"""The CPU back end: kernels built by a C++17 compiler, a fiber for each thread of a block, blocks over all cores.

The compiler is that of $CXX, or c++, g++, clang++, or the `ziglang` wheel. What the kernels run in is include/cpu.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import BackendError
from ...formats.machine import cores, words
from .cache import cached, key
from .command import run
from .host import Backend, arguments
from .sources import INCLUDE, Kernel, Module, Sources

HEADERS = INCLUDE / "cpu"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-w",
)
MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")
_ALIGN = 256
_POISON = {"ascending": 0xFF, "descending": 0x7E}


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler, with the flags that CXX may hold; BackendError where there is none."""
    if chosen := words("CXX"):
        return chosen
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise BackendError(
        "the CPU back end finds no C++ compiler",
        hint="install g++ or clang++, set CXX, or `pip install mq-quant[zig]`",
    )


def compiler_version(compiler: Sequence[str]) -> str:
    """What the compiler says of itself; BackendError where it cannot be run."""
    return run((*compiler, "--version"), "the C++ compiler")


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise BackendError(
            f"compiled kernels cannot be loaded: {e}",
            file=path,
            hint="code cannot run from every file system; point XDG_CACHE_HOME at another one",
        ) from None


def _processor() -> str:
    """The processor for which -march=native compiles: a shared cache must not serve another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return platform.machine() + "".join(
        sorted({line for line in lines if line.startswith(("flags", "Features"))})
    )


def entry_points(kernels: Sequence[Kernel]) -> str:
    """C++ that asserts each kernel's signature and gives it an entry `mq_entry_<name>(Block*, void** arguments)`."""
    out = ["#include <type_traits>"]
    for k in kernels:
        types = [p.ctype for p in k.parameters]
        restrict = ", ".join(t + (" __restrict__" if t.endswith("*") else "") for t in types)
        passed = ", ".join(f"*static_cast<{t}*>(a[{i}])" for i, t in enumerate(types))
        out.append(
            f'static_assert(std::is_same_v<decltype(&{k.name}), void (*)({restrict})>, "signature of {k.name}");\n'
            f'extern "C" __attribute__((visibility("default"))) void mq_entry_{k.name}(mq::Block* block, void** a) {{\n'
            f"  mq::self = block;\n  {k.name}({passed});\n}}"
        )
    return "\n".join(out) + "\n"


class CpuBackend(Backend):
    """Runs kernels on the CPU with `threads` OS threads (default: all cores).

    `order` is the order in which blocks begin and the threads of a block are resumed. Results that differ between
    "ascending" and "descending" show that a kernel has a race. New buffers and LDS hold other bytes in each order (NaN
    in the first), so results that depend on a value that was never written differ too.
    """

    name = "cpu"

    def __init__(
        self,
        sources: Sources | None = None,
        threads: int | None = None,
        order: Literal["ascending", "descending"] = "ascending",
    ) -> None:
        super().__init__(sources)
        if platform.machine() not in MACHINES:
            raise BackendError(f"the CPU back end runs on x86-64 and aarch64, not on {platform.machine()}")
        if order not in ("ascending", "descending"):
            raise BackendError(f"there is no fiber order {order!r}", hint="ascending or descending")
        self.threads = threads or cores()
        self.order = order
        self.device = f"CPU, {platform.machine()}, {self.threads} threads"
        self._compiler = find_compiler()
        self._identity = compiler_version(self._compiler) + _processor()
        self._run = _load(self._runtime()).mq_run
        self._libraries: dict[Module, ctypes.CDLL] = {}

    def _build(self, label: str, text: str, flags: Sequence[str]) -> Path:
        headers = [p.read_bytes() for p in sorted(HEADERS.rglob("*.h"))]
        arch = ("-mcpu=native",) if "ziglang" in self._compiler else ("-march=native",)
        command = (*self._compiler, *FLAGS, *arch, "-I", str(HEADERS), *flags)
        name = key((text, *headers, *self._compiler, *FLAGS, *arch, *flags, self._identity))

        def compile_to(path: Path) -> None:
            source = path.with_suffix(".cpp")
            source.write_text(text, encoding="utf-8")
            run(
                (*command, "-o", str(path), str(source)), f"{label} does not compile for the CPU", path.parent
            )

        return cached(f"cpu-{name}.so", compile_to)

    def _runtime(self) -> Path:
        return self._build("the CPU runtime", self.sources.text("runtime.cpp"), ())

    def _library(self, module: Module) -> ctypes.CDLL:
        if module not in self._libraries:
            text = self.sources.text(module.file) + entry_points(self.sources.modules()[module])
            path = self._build(module.label, text, [f"-D{d}" for d in module.defines])
            self._libraries[module] = _load(path)
        return self._libraries[module]

    def _alloc(self, nbytes: int) -> tuple[Any, int]:
        try:
            memory = np.empty(nbytes + _ALIGN, np.uint8)
        except MemoryError:
            raise BackendError(f"there is no memory for a buffer of {nbytes} bytes") from None
        start = -memory.ctypes.data % _ALIGN
        memory[start : start + nbytes] = _POISON[self.order]
        return memory, memory.ctypes.data + start

    def mark(self) -> float:
        return time.perf_counter()

    def seconds_between(self, first: float, last: float) -> float:
        return last - first

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def _copy_in(self, address: int, array: NDArray[Any]) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def _copy_out(self, array: NDArray[Any], address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def synchronize(self) -> None:
        """Launches end before they return."""

    def close(self) -> None:
        self._libraries.clear()

    def _dispatch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: Sequence[Any],
        lds: int,
    ) -> None:
        entry = getattr(self._library(kernel.module), f"mq_entry_{kernel.name}")
        message = ctypes.create_string_buffer(200)
        failed = self._run(
            entry,
            arguments(values),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_size_t(lds),
            ctypes.c_uint(self.threads),
            ctypes.c_int(self.order == "descending"),
            message,
            ctypes.c_size_t(len(message)),
        )
        if failed:
            raise BackendError(f"kernel {kernel.label} failed on the CPU: {message.value.decode()}")
