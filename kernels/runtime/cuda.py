"""The NVIDIA back end: nvrtc compiles the kernels for the device, the driver runs them.

It needs libcuda (the driver) and libnvrtc (the `nvidia-cuda-nvrtc` wheel, or a CUDA toolkit).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...formats.errors import BackendError
from .block_table import COUNTED
from .cache import code, key
from .drivers import CUDA, Library, load_library
from .gpu import Compiler, GpuBackend, compile_program
from .host import arguments
from .sources import INCLUDE, Kernel, Module, Sources

NVRTC = Compiler(
    name="nvrtc",
    libraries=("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"),
    prefix="nvrtc",
    code_size="GetCUBINSize",
    code="GetCUBIN",
)
_HEADER = INCLUDE / "cuda" / "hip" / "hip_runtime.h"
_OPTIONS = ("--std=c++17", "--fmad=false")
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_…
_OWN_LDS = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_DYNAMIC_LDS = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LDS_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_MOST_LDS = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with a value that is one number."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "lds")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@cache
def nvrtc() -> Library | None:
    """nvrtc from the wheel, the system or a toolkit; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    wheels = [
        p for r in roots for p in sorted(r.glob("*/lib/libnvrtc.so.*"), reverse=True) if ".alt." not in p.name
    ]
    toolkits = sorted(Path("/usr/local").glob("cuda*/lib64/libnvrtc.so"), reverse=True)
    return load_library([*wheels, *NVRTC.libraries, *toolkits])


def compile_module(sources: Sources, module: Module, arch: str, *extra: str) -> tuple[bytes, str]:
    """(cubin, log) of a module for an architecture such as "sm_90"; BackendError where nvrtc is missing or refuses."""
    library = nvrtc()
    if library is None:
        raise BackendError(
            "the cuda back end finds no nvrtc", hint="pip install mq-quant[cuda], or install a CUDA toolkit"
        )
    headers = {"hip/hip_runtime.h": _HEADER.read_text(encoding="utf-8")}
    options = (f"--gpu-architecture={arch}", *_OPTIONS, *extra)
    defines = tuple(f"-D{d}" for d in module.defines)
    return compile_program(
        NVRTC, library, module.label, sources.text(module.file), headers, (*options, *defines)
    )


def compiled_module(sources: Sources, module: Module, arch: str) -> bytes:
    """The cubin of a module, now or from an earlier run; BackendError as for `compile_module`."""
    text, header = sources.text(module.file), _HEADER.read_text(encoding="utf-8")
    parts = (text, header, *_OPTIONS, *module.defines, arch, nvrtc_version())

    def build(made: Path) -> None:
        made.write_bytes(compile_module(sources, module, arch)[0])

    return code(f"cuda-{key(parts)}.cubin", build)


def nvrtc_version() -> str:
    """major.minor of the nvrtc that is found, "none" without one."""
    library, major, minor = nvrtc(), ctypes.c_int(), ctypes.c_int()
    if library is None or library.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor)):
        return "none"
    return f"{major.value}.{minor.value}"


class CudaBackend(GpuBackend):
    """Runs kernels on an NVIDIA GPU."""

    name = "cuda"
    driver = CUDA
    counted: ClassVar[Mapping[str, int]] = {name: slice_ for name, (slice_, _) in COUNTED.items()}
    """`slices` of devices whose tensor cores count bits, sm_80 and later."""

    def _select(self) -> None:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(self.index))
        # A thread that waits sleeps: otherwise each of an encoder's streams would take a core for it.
        self.call("cuDevicePrimaryCtxSetFlags_v2", device, ctypes.c_uint(_BLOCKING_SYNC))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        major, minor, self._most_lds, self.multiprocessors = (
            self._attribute(device, number) for number in (*_CAPABILITY, _MOST_LDS, _MULTIPROCESSORS)
        )
        self.arch = f"sm_{major}{minor}"
        self._overlaps = major >= 9
        self.slices = self.counted if major >= 8 else {}
        self._written: frozenset[np.dtype[Any]] = frozenset()
        self._lds: dict[Kernel, int] = {}
        self.device = f"{name.value.decode()} ({self.arch})"

    def _attribute(self, device: ctypes.c_int, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), device)
        return value.value

    def _dispatch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: Sequence[Any],
        lds: int,
    ) -> None:
        """Launch a kernel; one that awaits the kernel before it begins while that runs, if it may.

        It may not if the kernel before it writes buffers of a type that it reads before it awaits (`early`).
        """
        written, self._written = self._written, kernel.written
        if not self._overlaps or kernel.early is None or kernel.early & written:
            super()._dispatch(kernel, grid, block, values, lds)
            return
        overlap = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        config = _LaunchConfig(*grid, *block, lds, self._stream, ctypes.pointer(overlap), 1)
        function, none = self._function(kernel), ctypes.c_void_p(None)
        self.call("cuLaunchKernelEx", ctypes.byref(config), function, arguments(values), none)

    def lds_for_copies(self, kernel: Kernel) -> int:
        """Bytes of LDS that a block may have beside the kernel's own arrays; 0 on devices that copy no rows."""
        if not self._overlaps:
            return 0
        if kernel not in self._lds:
            own, function = ctypes.c_int(), self._function(kernel)
            self.call("cuFuncGetAttribute", ctypes.byref(own), ctypes.c_int(_OWN_LDS), function)
            self._lds[kernel] = left = self._most_lds - own.value
            for attribute, value in ((_DYNAMIC_LDS, left), (_LDS_CARVEOUT, 100)):
                self.call("cuFuncSetAttribute", function, ctypes.c_int(attribute), ctypes.c_int(value))
        return self._lds[kernel]

    def _compile(self, module: Module) -> bytes:
        return compiled_module(self.sources, module, self.arch)
