"""`mq-quant doctor`: what this machine has, each with its version and what it means for mq-quant.

Every probe is a plain function that returns a finding. A probe that fails is a finding too, and stops no other.
"""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from ...formats import cache
from ...formats.errors import BackendError, HubError
from ...formats.machine import cores, memory

HUB_SECONDS = 5.0
ENOUGH_MEMORY = 4 << 30
ENOUGH_DISK = 100 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the table; `state` is ok, limited (something works less well) or missing (a command cannot run)."""

    what: str
    state: Literal["ok", "limited", "missing"]
    found: str
    meaning: str


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    fine = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok" if fine else "missing", found, "3.11 or newer runs mq-quant")


def _torch() -> Finding:
    found = _package("torch")
    if found is None:
        return Finding("torch", "missing", "not installed", "verify and calibrate need it")
    return Finding("torch", "ok", found, "runs the reference forward of verify and calibrate")


def _numba() -> Finding:
    found = _package("numba")
    if found is None:
        return Finding("numba", "missing", "not installed", "the encoder's loops are compiled with it")
    return Finding("numba", "ok", found, "compiles the encoder's loops, once per machine")


def _device() -> Finding:
    if _package("torch") is None:
        return Finding("device", "limited", "unknown without torch", "kernels run on the CPU")
    import torch

    if not torch.cuda.is_available():
        return Finding("device", "limited", "no GPU", "everything runs on the CPU")
    return Finding(
        "device", "ok", torch.cuda.get_device_name(), "calibrate and build can use it with --device cuda"
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _compiler() -> Finding:
    """The compiler that the CPU back end takes, found and run as it finds and runs it."""
    from ...kernels.runtime.cpu import compiler_version, find_compiler

    what = "c++ compiler"
    try:
        command = find_compiler()
        found = f"{_first_line(compiler_version(command))} ({shlex.join(command)})"
    except BackendError as e:
        return Finding(what, "missing", _first_line(e.problem), e.hint or "verify needs g++ or clang++")
    return Finding(what, "ok", found, "verify compiles its kernels for the CPU with it")


def _hip() -> Finding:
    """The hipcc that the hip back end takes."""
    from ...kernels.runtime.hip import find_hipcc, hipcc_version

    meaning = "kernels run on an AMD GPU only with ROCm installed"
    try:
        command = find_hipcc()
        if not command:
            return Finding("hipcc", "limited", "not installed", meaning)
        found = f"{_first_line(hipcc_version(command))} ({shlex.join(command)})"
    except BackendError as e:
        return Finding("hipcc", "limited", _first_line(e.problem), meaning)
    return Finding("hipcc", "ok", found, "compiles the kernels for an AMD GPU")


def _nvrtc() -> Finding:
    """The nvrtc that the cuda back end takes."""
    from ...kernels.runtime.cuda import nvrtc, nvrtc_version

    meaning = "kernels run on an NVIDIA GPU only with it: `pip install mq-quant[cuda]`"
    library = nvrtc()
    if library is None:
        return Finding("nvrtc", "limited", "not installed", meaning)
    try:
        found = f"{nvrtc_version()} ({library.name})"
    except BackendError as e:
        return Finding("nvrtc", "limited", _first_line(e.problem), meaning)
    return Finding("nvrtc", "ok", found, "compiles the kernels for an NVIDIA GPU")


def _cache() -> Finding:
    """Where compiled code is kept from one run to the next."""
    first = next(cache.places(), None)
    place = next((place for place in cache.places() if cache.private(place)), None)
    if place is None:
        return Finding("cache", "limited", "no folder can be written", "code is compiled anew in each run")
    if place == first:
        return Finding("cache", "ok", str(place), "compiled code and the tiny checkpoint are kept here")
    meaning = f"{first} cannot be written, or is open to others; XDG_CACHE_HOME names another place"
    return Finding("cache", "limited", str(place), meaning)


def _disk() -> Finding:
    try:
        free = shutil.disk_usage(".").free
    except OSError as e:
        return Finding("disk", "limited", f"unknown: {e.strerror}", "the current folder cannot be looked at")
    enough = free >= ENOUGH_DISK
    meaning = "room for a full-size tier" if enough else "a full-size tier needs 68 to 124 GB here"
    return Finding("disk", "ok" if enough else "limited", f"{free / 1e9:.1f} GB free in this folder", meaning)


def _memory() -> Finding:
    total = memory()
    enough = total >= ENOUGH_MEMORY
    meaning = "enough for a full-size build" if enough else "a full-size build needs 4 GiB"
    return Finding(
        "memory", "ok" if enough else "limited", f"{total / 2**30:.1f} GiB, {cores()} cores", meaning
    )


def _hub() -> Finding:
    from ...formats.hub.client import Hub
    from ...formats.hub.settings import offline

    if offline():
        return Finding("hub", "limited", "offline mode", "only local folders and what is cached can be built")
    began = time.monotonic()
    try:
        where = Hub().ping(HUB_SECONDS)
    except HubError as e:
        return Finding(
            "hub", "limited", f"{e.file}: {e.problem}", f"only local folders can be built; {e.hint}"
        )
    took = time.monotonic() - began
    return Finding("hub", "ok", f"{where} answers in {took:.2f} s", "checkpoints can be streamed from it")


PROBES: tuple[Callable[[], Finding], ...] = (
    _python, _torch, _numba, _device, _compiler, _hip, _nvrtc, _cache, _disk, _memory, _hub,
)  # fmt: skip


@dataclass(frozen=True)
class Examination:
    """All findings. The machine is healthy where nothing is missing."""

    version: str
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return all(finding.state != "missing" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        findings = [asdict(finding) for finding in self.findings]
        return {"version": self.version, "healthy": self.healthy, "findings": findings}


def examine() -> Examination:
    """Run every probe."""
    return Examination(version("mq-quant"), tuple(_asked(probe) for probe in PROBES))


def _asked(probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as e:  # whatever a driver or a library raises, the other probes are still asked
        what = probe.__name__.strip("_")
        return Finding(what, "limited", f"{type(e).__name__}: {e}", "could not be looked at")
