"""The AMD back end: hipcc (or hiprtc) compiles the kernels for the device's architecture, the HIP runtime runs them.

Of ROCm it needs libamdhip64, and hipcc or libhiprtc. Kernels use only what ROCm's hip_runtime.h declares, so that
this header compiles them.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from functools import cache
from pathlib import Path

from ...formats.errors import BackendError
from ...formats.machine import words
from .cache import code, key
from .command import run
from .drivers import HIP, SUFFIXES, load_library
from .gpu import Compiler, GpuBackend, compile_program
from .sources import Module, Sources

HIPRTC = Compiler(
    name="hiprtc",
    libraries=tuple(f"libhiprtc.so{s}" for s in SUFFIXES),
    prefix="hiprtc",
    code_size="GetCodeSize",
    code="GetCode",
)
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off")
_ROCM = "/opt/rocm"
_ARCH = re.compile(rb"gfx[0-9a-f]+(?::[a-z]+[+-])*")
_PROPERTIES = ("hipGetDevicePropertiesR0600", "hipGetDeviceProperties")


def find_hipcc() -> tuple[str, ...]:
    """The command of hipcc: on the path, under $ROCM_PATH or /opt/rocm; no words where it is missing.

    ROCM_PATH may hold flags behind the folder, as a shell would split them.
    """
    folder, *flags = words("ROCM_PATH") or (_ROCM,)
    candidate = Path(folder) / "bin" / "hipcc"
    found = shutil.which("hipcc") or (str(candidate) if candidate.is_file() else None)
    return (found, *flags) if found else ()


def architecture(properties: bytes) -> str:
    """gcnArchName within hipDeviceProp_t, wherever this version of ROCm has it; BackendError where there is none."""
    match = _ARCH.search(properties)
    if match is None:
        raise BackendError("the HIP runtime does not say which architecture the GPU has")
    return match[0].decode()


@cache
def hipcc_version(hipcc: tuple[str, ...]) -> str:
    """What hipcc says of itself; BackendError where it cannot be run."""
    return run((*hipcc, "--version"), "hipcc", settings=_settings())


def _settings() -> dict[str, str]:
    """ROCM_PATH for hipcc, which takes all of it for a folder."""
    return {"ROCM_PATH": rocm[0]} if (rocm := words("ROCM_PATH")) else {}


def compile_module(sources: Sources, module: Module, arch: str) -> bytes:
    """A module's code object for an architecture such as "gfx1151", cached; BackendError where no compiler is found."""
    text, hipcc = sources.text(module.file), find_hipcc()
    defines = [f"-D{d}" for d in module.defines]
    if hipcc:
        parts = (text, arch, *hipcc, *FLAGS, *defines, hipcc_version(hipcc))

        def build(made: Path) -> None:
            source = made.with_suffix(".hip")
            source.write_text(text, encoding="utf-8")
            target = ("--genco", f"--offload-arch={arch}", *FLAGS, *defines, "-o", str(made), str(source))
            run((*hipcc, *target), f"{module.label} does not compile with hipcc", made.parent, _settings())

    else:
        library = load_library(HIPRTC.libraries)
        if library is None:
            raise BackendError(
                "the hip back end finds neither hipcc nor libhiprtc",
                hint="install ROCm's hipcc or hiprtc, set ROCM_PATH, or use --backend cpu",
            )
        found = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        found.call("hiprtcVersion", ctypes.byref(major), ctypes.byref(minor))
        parts = (text, arch, *FLAGS, *defines, f"hiprtc {major.value}.{minor.value}")

        def build(made: Path) -> None:
            options = (f"--offload-arch={arch}", *FLAGS, *defines)
            made.write_bytes(compile_program(HIPRTC, found, module.label, text, {}, options)[0])

    return code(f"hip-{key(parts)}.hsaco", build)


class HipBackend(GpuBackend):
    """Runs kernels on an AMD GPU."""

    name = "hip"
    driver = HIP

    def _select(self) -> None:
        self.call("hipSetDevice", ctypes.c_int(self.index))
        properties = ctypes.create_string_buffer(8192)
        name = next((n for n in _PROPERTIES if self.library.has(n)), _PROPERTIES[-1])
        self.call(name, properties, ctypes.c_int(self.index))
        self.arch = architecture(properties.raw)
        self.device = f"{properties.value.decode(errors='replace') or 'AMD GPU'} ({self.arch})"

    def _compile(self, module: Module) -> bytes:
        return compile_module(self.sources, module, self.arch)
