"""The drivers of GPUs: the names under which they offer what a back end needs, and whether they see a device.

Nothing else is imported, so that a plan can ask what machine it is on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...formats.errors import BackendError


@dataclass(frozen=True)
class Driver:
    """The names under which a vendor's driver library offers what a back end needs."""

    vendor: str
    libraries: tuple[str, ...]
    init: str
    count: str
    total: str
    alloc: str
    free: str
    host_alloc: str
    host_free: str
    copy_in: str
    copy_out: str
    copy: str
    event: str
    record: str
    wait: str
    elapsed: str
    load: str
    function: str
    launch: str
    synchronize: str
    error: str
    stream: str
    stream_destroy: str
    event_destroy: str
    unload: str
    stream_copy_in: str
    stream_copy_out: str
    stream_copy: str
    stream_wait: str
    capture: str
    capture_end: str
    graph: str
    graph_launch: str
    graph_destroy: str
    graph_code_destroy: str


@dataclass(frozen=True, eq=False)
class Library:
    """A vendor's library, loaded from `name`."""

    name: str
    loaded: ctypes.CDLL

    def has(self, symbol: str) -> bool:
        return hasattr(self.loaded, symbol)

    def function(self, symbol: str) -> Any:
        """The function of that name; BackendError where the library lacks it."""
        try:
            return getattr(self.loaded, symbol)
        except AttributeError:
            raise BackendError(
                f"{self.name} has no function {symbol}",
                hint="the library is too old or incomplete; install the vendor's driver anew, or use the CPU",
            ) from None

    def call(self, symbol: str, *args: Any) -> int:
        """The status that a function returns."""
        return int(self.function(symbol)(*args))


def load_library(names: Iterable[str | Path]) -> Library | None:
    """The first of `names` that loads."""
    for name in names:
        with suppress(OSError):
            return Library(str(name), ctypes.CDLL(str(name)))
    return None


def device_count(driver: Driver) -> int:
    """Devices that the driver sees; 0 where there is no driver, or one that lacks the functions that count."""
    library, count = load_library(driver.libraries), ctypes.c_int(0)
    if library is None or not (library.has(driver.init) and library.has(driver.count)):
        return 0
    if library.call(driver.init, ctypes.c_uint(0)) or library.call(driver.count, ctypes.byref(count)):
        return 0
    return count.value


CUDA = Driver(
    vendor="NVIDIA",
    libraries=("libcuda.so.1", "libcuda.so"),
    init="cuInit",
    count="cuDeviceGetCount",
    total="cuDeviceTotalMem_v2",
    alloc="cuMemAlloc_v2",
    free="cuMemFree_v2",
    host_alloc="cuMemHostAlloc",
    host_free="cuMemFreeHost",
    copy_in="cuMemcpyHtoD_v2",
    copy_out="cuMemcpyDtoH_v2",
    copy="cuMemcpyDtoD_v2",
    event="cuEventCreate",
    record="cuEventRecord",
    wait="cuEventSynchronize",
    elapsed="cuEventElapsedTime",
    load="cuModuleLoadData",
    function="cuModuleGetFunction",
    launch="cuLaunchKernel",
    synchronize="cuCtxSynchronize",
    error="cuGetErrorString",
    stream="cuStreamCreate",
    stream_destroy="cuStreamDestroy_v2",
    event_destroy="cuEventDestroy_v2",
    unload="cuModuleUnload",
    stream_copy_in="cuMemcpyHtoDAsync_v2",
    stream_copy_out="cuMemcpyDtoHAsync_v2",
    stream_copy="cuMemcpyDtoDAsync_v2",
    stream_wait="cuStreamSynchronize",
    capture="cuStreamBeginCapture_v2",
    capture_end="cuStreamEndCapture",
    graph="cuGraphInstantiateWithFlags",
    graph_launch="cuGraphLaunch",
    graph_destroy="cuGraphDestroy",
    graph_code_destroy="cuGraphExecDestroy",
)

SUFFIXES = ("", ".7", ".6", ".5")
"""Versions of ROCm's libraries, the newest first."""

HIP = Driver(
    vendor="AMD",
    libraries=tuple(f"libamdhip64.so{s}" for s in SUFFIXES),
    init="hipInit",
    count="hipGetDeviceCount",
    total="hipDeviceTotalMem",
    alloc="hipMalloc",
    free="hipFree",
    host_alloc="hipHostMalloc",
    host_free="hipHostFree",
    copy_in="hipMemcpyHtoD",
    copy_out="hipMemcpyDtoH",
    copy="hipMemcpyDtoD",
    event="hipEventCreateWithFlags",
    record="hipEventRecord",
    wait="hipEventSynchronize",
    elapsed="hipEventElapsedTime",
    load="hipModuleLoadData",
    function="hipModuleGetFunction",
    launch="hipModuleLaunchKernel",
    synchronize="hipDeviceSynchronize",
    error="hipGetErrorString",
    stream="hipStreamCreateWithFlags",
    stream_destroy="hipStreamDestroy",
    event_destroy="hipEventDestroy",
    unload="hipModuleUnload",
    stream_copy_in="hipMemcpyHtoDAsync",
    stream_copy_out="hipMemcpyDtoHAsync",
    stream_copy="hipMemcpyDtoDAsync",
    stream_wait="hipStreamSynchronize",
    capture="hipStreamBeginCapture",
    capture_end="hipStreamEndCapture",
    graph="hipGraphInstantiateWithFlags",
    graph_launch="hipGraphLaunch",
    graph_destroy="hipGraphDestroy",
    graph_code_destroy="hipGraphExecDestroy",
)


def gpu_memory() -> int:
    """Bytes of memory of the first GPU; 0 where there is none, or its driver does not say."""
    for driver in (CUDA, HIP):
        if device_count(driver):
            library, size = load_library(driver.libraries), ctypes.c_size_t(0)
            if library is None or not library.has(driver.total):
                return 0
            status = library.call(driver.total, ctypes.byref(size), ctypes.c_int(0))
            return 0 if status else size.value
    return 0


def best_device() -> str:
    """`cuda`, for either make of GPU, where one is here; else `cpu`."""
    return "cuda" if device_count(CUDA) or device_count(HIP) else "cpu"
