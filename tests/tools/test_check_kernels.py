"""Every kernel compiles for the GPUs of the compile check, and the check refuses code objects that are not right."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import check_kernels as check
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.errors import CheckError
from mq_quant.kernels.forward.geometry import (
    EXPERT_THREADS,
    MOST_RUNS,
    SHARE,
    WAVE_ROWS,
)
from mq_quant.kernels.runtime import cuda
from mq_quant.kernels.runtime.sources import INCLUDE, Module, Sources

needs_clang = pytest.mark.skipif(check.find_clang() is None, reason="needs clang-19 and lld-19")
needs_nvrtc = pytest.mark.skipif(cuda.nvrtc() is None, reason="needs nvrtc (pip install nvidia-cuda-nvrtc)")
MODULES = list(Sources().modules())


@needs_clang
@pytest.mark.parametrize("arch", check.AMD_ARCHES)
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.label)
def test_kernels_compile_for_amd_without_scratch_memory(module, arch):
    sources, clang = Sources(), check.find_clang()
    kernels = sources.modules()[module]
    usage = check.check_amd(sources, module, kernels, arch, clang)
    assert [u.kernel for u in usage] == [k.label for k in kernels]
    assert all(u.scratch == 0 and 0 < u.vector <= 256 and u.scalar > 0 and u.lds <= 65536 for u in usage)


@needs_nvrtc
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.label)
def test_kernels_compile_for_nvidia(module):
    sources = Sources()
    usage = check.check_nvidia(sources, module, sources.modules()[module], check.NVIDIA_ARCH)
    assert all(0 < u.vector <= 255 for u in usage)
    assert all(u.lds <= 49152 for u in usage)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_devices_that_do_not_count_bits_or_copy_rows_have_kernels_too(arch):
    sources, module = Sources(), Module("matrix.hip", "MQ3-Lloyd")
    usage = check.check_nvidia(sources, module, sources.modules()[module], arch)
    assert all(u.lds <= 49152 for u in usage)


GROUPS = {"expert_gate_up": 12, "expert_down": 6, "expert_activated_down": 6}
"""By product, groups of a row of MiniMax-M2.7."""


def usage_of(name, fmt):
    sources, module = Sources(), Module("matrix.hip", fmt)
    usage = check.check_nvidia(sources, module, sources.modules()[module], check.NVIDIA_ARCH)
    return next(u for u in usage if u.kernel == f"{name}[{fmt}]")


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "fmt"),
    [(n, f) for n in GROUPS for f in WAVE_ROWS],
)
def test_a_multiprocessor_holds_a_block_that_streams_and_a_ring_of_some_stages(name, fmt):
    """It has 64 K registers, and a block may have 227 KB of LDS."""
    own, groups = usage_of(name, fmt), GROUPS[name]
    members = -(-groups // SHARE)
    stage = MOST_RUNS // members * WAVE_ROWS[fmt] * (groups * BY_NAME[fmt].nbytes(256) + 16 * members + 4)
    assert EXPERT_THREADS * own.vector <= 65536
    assert own.lds + 3 * stage <= 227 * 1024


@pytest.fixture(scope="module")
def built():
    """(code object of vector.hip for gfx1151, its kernels)."""
    if check.find_clang() is None:
        pytest.skip("needs clang-19 and lld-19")
    sources, module = Sources(), Module("vector.hip")
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "k.hip", Path(scratch) / "k.hsaco"
        source.write_text(sources.text(module.file))
        include = str(INCLUDE / "amdgpu")
        command = [check.find_clang(), "--offload-arch=gfx1151", *check._FLAGS, "-I", include]
        subprocess.run([*command, str(source), "-o", str(made)], check=True, capture_output=True)
        return made.read_bytes(), sources.modules()[module]


def test_a_right_code_object_passes(built):
    data, kernels = built
    check.judge(data, "gfx1151", kernels, "vector")


def test_a_code_object_of_another_machine_or_architecture_is_refused(built):
    data, kernels = built
    wrong = bytearray(data)
    struct.pack_into("<H", wrong, 18, 62)
    with pytest.raises(CheckError, match="code for EM_X86_64, not EM_AMDGPU"):
        check.judge(bytes(wrong), "gfx1151", kernels, "vector")
    with pytest.raises(CheckError, match=r"for gfx1100 has flags .*4a, not 0x41"):
        check.judge(data, "gfx1100", kernels, "vector")


def test_a_code_object_without_a_kernel_is_refused(built):
    data, kernels = built
    assert b"\0add.kd\0" in data
    with pytest.raises(CheckError, match="describes"):
        check.judge(data.replace(b"\0add.kd\0", b"\0add.kx\0"), "gfx1151", kernels, "vector")
    with pytest.raises(CheckError, match="describes"):
        check.judge(data, "gfx1151", kernels[:-1], "vector")


@pytest.mark.parametrize("keep", [64, 100, 1000, -10])
def test_a_file_cut_short_is_refused(built, keep):
    data, kernels = built
    with pytest.raises(CheckError, match="ELF64 file"):
        check.judge(data[:keep], "gfx1151", kernels, "vector")


def test_what_is_no_elf_file_is_refused():
    with pytest.raises(CheckError, match="not an ELF64 file"), check.read_elf(b"MZ" + b"\0" * 100):
        pass


@needs_clang
def test_a_function_that_nobody_defines_is_found(tmp_path):
    (tmp_path / "k.hip").write_text(
        '#include "device.h"\nextern __device__ float powf(float, float);\n'
        "KERNEL(32) k(float* out) { out[0] = powf(out[0], out[1]); }\n"
    )
    sources, module = Sources(tmp_path), Module("k.hip")
    with pytest.raises(CheckError, match=r"undefined|powf"):
        check.check_amd(sources, module, sources.modules()[module], "gfx1151", check.find_clang())


@needs_clang
def test_a_source_that_does_not_compile_says_why(tmp_path):
    (tmp_path / "k.hip").write_text('#include "device.h"\nKERNEL(32) k(int n) { nonsense; }\n')
    sources, module = Sources(tmp_path), Module("k.hip")
    with pytest.raises(CheckError, match=r"k\.hip does not compile for gfx1100(.|\n)*nonsense"):
        check.check_amd(sources, module, sources.modules()[module], "gfx1100", check.find_clang())


def test_without_clang_the_check_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(check.BackendError, match="apt-get install --no-install-recommends clang-19 lld-19"):
        check.check_all(Sources())


def test_a_check_that_saw_no_kernel_fails(tmp_path):
    with pytest.raises(CheckError, match="saw no kernel"):
        check.check_all(Sources(tmp_path), amd=False)


@needs_nvrtc
def test_the_command_prints_registers_of_every_kernel(monkeypatch, capsys, tmp_path):
    shutil.copy(Sources().path("attention.hip"), tmp_path)
    monkeypatch.setattr(check, "Sources", lambda: Sources(tmp_path))
    monkeypatch.setattr("sys.argv", ["check", "--no-amd"])
    assert check.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "arch", "vector", "scalar", "scratch", "lds"]
    assert sorted(line.split()[0] for line in lines[1:]) == ["attention", "kv_append"]
