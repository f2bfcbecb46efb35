"""Compile every kernel for the GPUs that are not here, and look at what came out: `python -m mq_quant.kernels.check`.

For AMD it needs clang and lld of version 18 or later (Debian: clang-19, lld-19) and no ROCm; for NVIDIA, nvrtc. What
it asserts of a code object: the machine, the architecture, one descriptor per kernel, nothing left undefined. It
prints the registers and LDS of each kernel. Depends on sources, cuda and errors.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..formats.errors import BackendError, CheckError
from . import cuda
from .sources import FOLDER, Kernel, Module, Sources

ELF_AMDGPU = 0xE0
AMD_ARCHES = {"gfx1100": 0x41, "gfx1151": 0x4A, "gfx1201": 0x4E}
"""Architectures that are checked, with the number that e_flags holds for them."""
NVIDIA_ARCH = "sm_90"
CLANGS = ("clang-19", "clang-20", "clang-18", "clang")
_FLAGS = (
    *("-x", "hip", "--offload-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib", "-fdeclspec"),
    *("-std=c++17", "-O3", "-ffp-contract=off", "-mcumode", "-Rpass-analysis=kernel-resource-usage"),
)
_REMARK = re.compile(
    r"remark:.*?\s(Function Name|TotalSGPRs|SGPRs|VGPRs|ScratchSize|LDS Size)(?: \[[^]]*\])?: (\S+)"
)
_PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?Used (\d+) registers(.*?)(?=\n\S*\s*ptxas info\s*: Comp|\Z)", re.S
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture; `scalar` registers are AMD's only, `scratch` and `lds` are bytes."""

    kernel: str
    arch: str
    vector: int
    scalar: int
    scratch: int
    lds: int


@dataclass(frozen=True)
class Symbol:
    name: str
    defined: bool


@dataclass(frozen=True)
class CodeObject:
    """What the check reads of an ELF file: machine, flags, and the dynamic symbols."""

    machine: int
    flags: int
    symbols: tuple[Symbol, ...]


def read_code_object(data: bytes) -> CodeObject:
    """Parse an ELF64 file; CheckError where it is none."""
    if data[:5] != b"\x7fELF\x02" or len(data) < 64:
        raise CheckError("the compiler's output is not an ELF64 file")
    machine, flags = struct.unpack_from("<H", data, 18)[0], struct.unpack_from("<I", data, 48)[0]
    table, size, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    symbols: list[Symbol] = []
    for section in sections:
        if section[1] != 11:  # SHT_DYNSYM
            continue
        names = sections[section[6]][4]
        for at in range(section[4] + 24, section[4] + section[5], 24):
            name, _, _, index = struct.unpack_from("<IBBH", data, at)
            end = data.index(b"\0", names + name)
            symbols.append(Symbol(data[names + name : end].decode(), index != 0))
    return CodeObject(machine, flags, tuple(symbols))


def judge(code: CodeObject, arch: str, kernels: Sequence[Kernel], label: str) -> None:
    """CheckError where a code object is not what the kernels of a module must become on an AMD architecture."""
    if code.machine != ELF_AMDGPU:
        raise CheckError(f"{label} for {arch} has machine {code.machine:#x}, not {ELF_AMDGPU:#x}")
    if code.flags & 0xFF != AMD_ARCHES[arch]:
        raise CheckError(f"{label} for {arch} has flags {code.flags:#x}, not {AMD_ARCHES[arch]:#x}")
    if missing := [s.name for s in code.symbols if not s.defined]:
        raise CheckError(f"{label} for {arch} leaves undefined: {', '.join(missing)}")
    found = sorted(s.name for s in code.symbols if s.name.endswith(".kd"))
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
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "k.hip", Path(scratch) / "k.hsaco"
        source.write_text(sources.text(module.file), encoding="utf-8")
        command = [clang, f"--offload-arch={arch}", *_FLAGS, "-I", str(FOLDER / "include" / "amdgpu")]
        command += [*(f"-D{d}" for d in module.defines), str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckError(f"{module.label} does not compile for {arch}:\n{done.stderr.strip()[-4000:]}")
        judge(read_code_object(made.read_bytes()), arch, kernels, module.label)
    return list(_amd_usage(done.stderr, module, arch))


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
    _, log = cuda.compile_module(sources, module, arch, "--ptxas-options=-v")
    out = []
    for name, registers, rest in _PTXAS.findall(log):
        shared = _SHARED.search(rest)
        label = name + (f"[{module.format}]" if module.format else "")
        out.append(Usage(label, arch, int(registers), 0, 0, int(shared[1]) if shared else 0))
    if sorted(u.kernel for u in out) != sorted(k.label for k in kernels):
        raise CheckError(f"{module.label} for {arch} has kernels {[u.kernel for u in out]}")
    return out


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
    out: list[Usage] = []
    for module, kernels in sources.modules().items():
        if amd and clang:
            for arch in AMD_ARCHES:
                out += check_amd(sources, module, kernels, arch, clang)
        if nvidia:
            out += check_nvidia(sources, module, kernels, NVIDIA_ARCH)
    if not out:
        raise CheckError("the compile check saw no kernel")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mq_quant.kernels.check", description=__doc__)
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
