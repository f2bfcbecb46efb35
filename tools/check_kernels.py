"""Compile every kernel for the GPUs that are not here, and look at what came out: `python tools/check_kernels.py`.

For AMD it needs clang and lld of version 18 or later (Debian: clang-19, lld-19) and no ROCm; for NVIDIA, nvrtc. What
it asserts of a code object: the machine, the architecture, one descriptor per kernel, nothing left undefined. It
prints the registers and LDS of each kernel. What it has compiled it keeps, and the tests of it look at the same code.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile
from mq_quant.formats.errors import BackendError, CheckError
from mq_quant.formats.machine import cores
from mq_quant.kernels.runtime import cache, cuda
from mq_quant.kernels.runtime.sources import INCLUDE, Kernel, Module, Sources

AMD_ARCHES = {"gfx1100": 0x41, "gfx1151": 0x4A, "gfx1201": 0x4E}
"""Architectures that are checked, with the number that e_flags holds for them."""
NVIDIA_ARCH = "sm_90"
NVIDIA_RESERVED = 1024
"""Bytes of shared memory that every block gives to the system, counted in a kernel's section."""
CLANGS = ("clang-19", "clang-20", "clang-18", "clang")
_FLAGS = (
    *("-x", "hip", "--offload-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib", "-fdeclspec"),
    *("-std=c++17", "-O3", "-ffp-contract=off", "-mcumode", "-Rpass-analysis=kernel-resource-usage"),
)
_REMARK = re.compile(
    r"remark:.*?\s(Function Name|TotalSGPRs|SGPRs|VGPRs|ScratchSize|LDS Size)(?: \[[^]]*\])?: (\S+)"
)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture; `scalar` registers are AMD's only, `scratch` and `lds` are bytes."""

    kernel: str
    arch: str
    vector: int
    scalar: int
    scratch: int
    lds: int


@contextmanager
def read_elf(code: bytes) -> Iterator[ELFFile]:
    """The ELF64 file in `code`; CheckError where it is none, or where what the caller reads of it is broken."""
    try:
        file = ELFFile(io.BytesIO(code))
        if file.elfclass != 64 or not file.little_endian:
            raise ELFError("not 64 bits, little endian")
    except (ELFError, ConstructError) as e:
        raise CheckError(f"the compiler's output is not an ELF64 file: {e}") from None
    try:
        yield file
    except (ELFError, ConstructError, UnicodeDecodeError, OverflowError, AttributeError) as e:
        raise CheckError(f"the compiler's output is a broken ELF64 file: {e}") from None


def judge(code: bytes, arch: str, kernels: Sequence[Kernel], label: str) -> None:
    """CheckError where a code object is not what the kernels of a module must become on an AMD architecture."""
    with read_elf(code) as file:
        machine, flags = file["e_machine"], file["e_flags"]
        table = file.get_section_by_name(".dynsym")
        symbols = [s for s in table.iter_symbols() if s.name] if table else []
        missing = [s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF"]
    if machine != "EM_AMDGPU":
        raise CheckError(f"{label} for {arch} is code for {machine}, not EM_AMDGPU")
    if flags & 0xFF != AMD_ARCHES[arch]:
        raise CheckError(f"{label} for {arch} has flags {flags:#x}, not {AMD_ARCHES[arch]:#x}")
    if missing:
        raise CheckError(f"{label} for {arch} leaves undefined: {', '.join(missing)}")
    found = sorted(s.name for s in symbols if s.name.endswith(".kd"))
    expected = sorted(f"{k.name}.kd" for k in kernels)
    if found != expected:
        raise CheckError(f"{label} for {arch} describes {found}, not {expected}")


def find_clang() -> str | None:
    """A clang whose lld is there too; None where either is missing."""
    for name in CLANGS:
        version = name.removeprefix("clang")
        if shutil.which(name) and (shutil.which(f"ld.lld{version}") or shutil.which(f"lld{version}")):
            return name
    return None


def check_amd(
    sources: Sources, module: Module, kernels: Sequence[Kernel], arch: str, clang: str
) -> list[Usage]:
    """Compile a module for an AMD architecture and judge it; CheckError where it does not hold."""
    made, remarks = _compiled_for_amd(sources, module, arch, clang)
    judge(made, arch, kernels, module.label)
    return list(_amd_usage(remarks, module, arch))


def _compiled_for_amd(sources: Sources, module: Module, arch: str, clang: str) -> tuple[bytes, str]:
    """The code object of a module and what clang remarks on it, now or in an earlier run."""
    text, headers = sources.text(module.file), INCLUDE / "amdgpu"
    command = (clang, f"--offload-arch={arch}", *_FLAGS, *(f"-D{d}" for d in module.defines))
    parts = (text, *(p.read_bytes() for p in sorted(headers.rglob("*.h"))), *command, _version(clang))

    def build(made: Path) -> None:
        source, code_object = made.with_suffix(".hip"), made.with_suffix(".hsaco")
        source.write_text(text, encoding="utf-8")
        to_file = ("-I", str(headers), str(source), "-o", str(code_object))
        done = subprocess.run((*command, *to_file), capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckError(f"{module.label} does not compile for {arch}:\n{done.stderr.strip()[-4000:]}")
        code = code_object.read_bytes()
        made.write_bytes(struct.pack("<Q", len(code)) + code + done.stderr.encode())

    kept = cache.code(f"check-{cache.key(parts)}", build)
    (size,) = struct.unpack_from("<Q", kept)
    return kept[8 : 8 + size], kept[8 + size :].decode()


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _amd_usage(remarks: str, module: Module, arch: str) -> Iterator[Usage]:
    values: dict[str, str] = {}
    for name, value in _REMARK.findall(remarks):
        if name == "Function Name":
            values = {}
        values[name.removeprefix("Total")] = value
        if name == "LDS Size":
            label = values["Function Name"] + (f"[{module.format}]" if module.format else "")
            numbers = [int(values.get(k, "0")) for k in ("VGPRs", "SGPRs", "ScratchSize", "LDS Size")]
            yield Usage(label, arch, *numbers)


def check_nvidia(sources: Sources, module: Module, kernels: Sequence[Kernel], arch: str) -> list[Usage]:
    """Compile a module with nvrtc; CheckError where the kernels are not all there."""
    with read_elf(cuda.compiled_module(sources, module, arch)) as file:
        registers = dict(_registers(file))
        shared = {k: file.get_section_by_name(f".nv.shared.{k.name}") for k in kernels}
    if sorted(registers) != sorted(k.name for k in kernels):
        raise CheckError(f"{module.label} for {arch} has kernels {sorted(registers)}")
    out = []
    for kernel in kernels:
        section = shared[kernel]
        lds = max(0, section["sh_size"] - NVIDIA_RESERVED) if section else 0
        out.append(Usage(kernel.label, arch, registers[kernel.name], 0, 0, lds))
    return out


def _registers(file: ELFFile) -> Iterator[tuple[str, int]]:
    """(kernel, registers) of a cubin, from the records of type 4, attribute 0x2f in .nv.info."""
    table, info = file.get_section_by_name(".symtab"), file.get_section_by_name(".nv.info")
    content, at = info.data() if info else b"", 0
    while at + 4 <= len(content):
        kind, attribute, size = struct.unpack_from("<BBH", content, at)
        if (kind, attribute) == (4, 0x2F):
            symbol, count = struct.unpack_from("<II", content, at + 4)
            yield table.get_symbol(symbol).name, count
        at += 4 + (size if kind == 4 else 0)


def check_all(sources: Sources, amd: bool = True, nvidia: bool = True) -> list[Usage]:
    """Check every module.

    BackendError where a compiler that is asked for is missing, CheckError where a module does not hold.
    """
    clang = find_clang()
    if amd and clang is None:
        raise BackendError(
            "the compile check finds no clang with lld",
            hint="apt-get install --no-install-recommends clang-19 lld-19",
        )

    def check(work: tuple[Module, str]) -> list[Usage]:
        module, arch = work
        kernels = sources.modules()[module]
        if clang and arch in AMD_ARCHES:
            return check_amd(sources, module, kernels, arch, clang)
        return check_nvidia(sources, module, kernels, arch)

    arches = (*(AMD_ARCHES if amd else ()), *((NVIDIA_ARCH,) if nvidia else ()))
    with ThreadPoolExecutor(cores()) as pool:
        found = pool.map(check, itertools.product(sources.modules(), arches))
        out = [usage for checked in found for usage in checked]
    if not out:
        raise CheckError("the compile check saw no kernel")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/check_kernels.py", description=__doc__)
    parser.add_argument("--no-amd", action="store_true", help="leave out the AMD architectures")
    parser.add_argument("--no-nvidia", action="store_true", help="leave out nvrtc")
    options = parser.parse_args()
    try:
        usage = check_all(Sources(), amd=not options.no_amd, nvidia=not options.no_nvidia)
    except (BackendError, CheckError) as e:
        print(e)
        return e.exit_code
    print(f"{'kernel':<28}{'arch':<9}{'vector':>7}{'scalar':>7}{'scratch':>8}{'lds':>7}")
    for u in usage:
        print(f"{u.kernel:<28}{u.arch:<9}{u.vector:>7}{u.scalar:>7}{u.scratch:>8}{u.lds:>7}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
