"""The hip back end where there is no AMD GPU: what is missing is named, and its calls follow HIP's conventions."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.forward import ops
from mq_quant.kernels.runtime import hip
from mq_quant.kernels.runtime.drivers import HIP, device_count
from mq_quant.kernels.runtime.hip import HipBackend
from mq_quant.kernels.runtime.sources import Module, Sources

HERE = Path(__file__).parent
VECTOR = Module("vector.hip")


def backend_with(*libraries):
    return type("OtherHip", (HipBackend,), {"driver": replace(HIP, libraries=libraries)})


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """A stand-in for libamdhip64 (fake_hip.c), because no machine of the tests has ROCm."""
    library = tmp_path_factory.mktemp("hip") / "libamdhip64.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-w", str(HERE / "fake_hip.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


@pytest.fixture
def hipcc(monkeypatch, tmp_path):
    """A hipcc that notes its arguments and writes what the stand-in takes for code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    tool, log = tmp_path / "bin" / "hipcc", tmp_path / "log"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >>{log}\n'
        '[ "$1" = --version ] && { echo "HIP version: 6.4"; exit; }\n'
        'while [ "$1" != -o ]; do shift; done\ngrep -q nonsense "$3" && { echo "k.hip: nonsense" >&2; exit 1; }\n'
        'printf code >"$2"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    hip.hipcc_version.cache_clear()
    return log


def test_a_machine_without_rocm_is_told_so():
    kind = backend_with("libno-such-hip.so.9", "libno-such-hip.so.8")
    assert not kind.available()
    with pytest.raises(
        BackendError, match=r"finds no driver: libno-such-hip\.so\.9 does not load\n  install the AMD"
    ):
        kind()


def test_the_library_is_looked_for_under_every_name():
    assert HIP.libraries == (
        "libamdhip64.so",
        "libamdhip64.so.7",
        "libamdhip64.so.6",
        "libamdhip64.so.5",
    )


def test_a_machine_without_an_amd_gpu_is_told_so(runtime, monkeypatch):
    monkeypatch.setenv("FAKE_HIP_DEVICES", "0")
    assert device_count(backend_with(runtime).driver) == 0
    with pytest.raises(BackendError, match="finds no AMD GPU\n  use --backend cpu"):
        backend_with(runtime)()


@pytest.mark.parametrize(
    ("properties", "arch"),
    [
        (b"AMD Radeon 8060S\0" + b"\0" * 900 + b"gfx1151\0", "gfx1151"),
        (b"AMD Instinct MI300X\0\x01\x02gfx942:sramecc+:xnack-\0\0", "gfx942:sramecc+:xnack-"),
        (b"gfx90a:sramecc+:xnack-\0", "gfx90a:sramecc+:xnack-"),
    ],
)
def test_the_architecture_is_found_wherever_the_properties_hold_it(properties, arch):
    assert hip.architecture(properties) == arch


def test_properties_without_an_architecture_are_refused():
    with pytest.raises(BackendError, match="does not say which architecture"):
        hip.architecture(b"\0" * 1472)


def test_without_a_compiler_both_that_would_do_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setattr(hip, "HIPRTC", replace(hip.HIPRTC, libraries=("libno-such-rtc.so",)))
    with pytest.raises(BackendError, match=r"neither hipcc nor libhiprtc\n  install ROCm's hipcc"):
        hip.compile_module(Sources(), VECTOR, "gfx1151")


def test_hipcc_is_found_under_rocm_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    assert hip.find_hipcc() == ()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hipcc").write_text("")
    assert hip.find_hipcc() == (str(tmp_path / "bin" / "hipcc"),)


def test_rocm_path_may_hold_spaces_and_flags(monkeypatch, tmp_path):
    folder = tmp_path / "my rocm"
    (folder / "bin").mkdir(parents=True)
    tool, log = folder / "bin" / "hipcc", tmp_path / "log"
    tool.write_text(
        f'#!/bin/sh\necho "$ROCM_PATH: $@" >>{log}\nwhile [ $# != 0 ] && [ "$1" != -o ]; do shift; done\n'
        'test $# = 0 || printf code >"$2"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/bin")
    for value, flags in ((str(folder), ()), (f"'{folder}' -O1", ("-O1",))):
        monkeypatch.setenv("ROCM_PATH", value)
        assert hip.find_hipcc() == (str(tool), *flags)
        hip.hipcc_version.cache_clear()
        assert hip.compile_module(Sources(), VECTOR, "gfx1151") == b"code"
        first, second = log.read_text().splitlines()
        assert first == " ".join((f"{folder}:", *flags, "--version"))
        assert second.startswith(" ".join((f"{folder}:", *flags, "--genco --offload-arch=gfx1151")))
        log.unlink()


def test_a_hipcc_that_cannot_be_run_is_named(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hipcc").write_text("not a program")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    hip.hipcc_version.cache_clear()
    with pytest.raises(BackendError, match="bin/hipcc cannot be run: Permission denied"):
        hip.compile_module(Sources(), VECTOR, "gfx1151")


def test_hipcc_runs_once_for_a_source_and_architecture(hipcc):
    for arch in ("gfx1151", "gfx1151", "gfx1100"):
        assert hip.compile_module(Sources(), Module("matrix.hip", "MQ2-Lloyd"), arch) == b"code"
    lines = [line for line in hipcc.read_text().splitlines() if "--version" not in line]
    assert len(lines) == 2
    assert lines[0].startswith(
        "--genco --offload-arch=gfx1151 -O3 -std=c++17 -ffp-contract=off -DFORMAT=MQ2_Lloyd -o "
    )


def test_what_hipcc_says_is_shown(hipcc, tmp_path):
    (tmp_path / "k.hip").write_text('#include "device.h"\nKERNEL(32) k(int n) { nonsense; }\n')
    with pytest.raises(BackendError, match=r"k\.hip does not compile with hipcc:\nk\.hip: nonsense"):
        hip.compile_module(Sources(tmp_path), Module("k.hip"), "gfx1151")


@pytest.mark.parametrize("own_stream", [False, True])
def test_a_launch_passes_its_arguments_as_hip_takes_them(runtime, hipcc, own_stream):
    with backend_with(runtime)(own_stream=own_stream) as gpu:
        assert (gpu.name, gpu.arch, gpu.device) == ("hip", "gfx1151", "Fake Radeon (gfx1151)")
        h, x = gpu.upload(np.arange(300, dtype=np.float32)), gpu.upload(np.full(300, 0.5, np.float32))
        ops.add(gpu, h, x)
        assert np.array_equal(gpu.download(h), np.arange(300, dtype=np.float32) + np.float32(0.5))
        gpu.copy(x, h)
        assert np.array_equal(gpu.download(x), gpu.download(h))
        assert gpu.seconds_between(gpu.mark(), gpu.mark()) == pytest.approx(0.002)


@pytest.mark.parametrize("own_stream", [False, True])
def test_what_is_recorded_happens_at_each_call_and_not_before(runtime, hipcc, own_stream):
    with backend_with(runtime)(own_stream=own_stream) as gpu:
        h, x = gpu.upload(np.zeros(300, np.float32)), gpu.upload(np.ones(300, np.float32))
        ops.add(gpu, h, x)

        def twice():
            ops.add(gpu, h, x)
            ops.add(gpu, h, x)

        again = gpu.record(twice)
        assert gpu.download(h)[0] == 1
        again()
        again()
        assert gpu.download(h)[299] == 5
        held = gpu.library.function("fake_held")
        before = held()
    assert before - held() == 3 + 2 * own_stream  # two buffers and a module; the stream and the graph


def test_memory_that_others_hold_in_reserve_is_asked_for_before_too_little_is_an_error(runtime, monkeypatch):
    asked = []
    with backend_with(runtime)(make_room=lambda: asked.append("room")) as gpu:
        gpu.alloc((64,), np.uint8)
        assert not asked
        with pytest.raises(BackendError, match="has no 2,199,023,255,552 bytes of memory left"):
            gpu.alloc((1 << 41,), np.uint8)
        assert asked == ["room"]
        real = gpu.library.call

        def full(name, *rest):
            return 2 if name == "hipMalloc" and len(asked) < 2 else real(name, *rest)

        monkeypatch.setattr(type(gpu.library), "call", lambda _, *call: full(*call))
        assert gpu.download(gpu.upload(np.arange(3000, dtype=np.float64)))[2999] == 2999
    assert asked == ["room"] * 2


def test_page_locked_memory_is_plain_memory_to_numpy(runtime):
    with backend_with(runtime)() as gpu:
        memory = gpu.pinned(64)
        memory[:] = np.arange(64)
        target = gpu.alloc((64,), np.uint8)
        gpu.write(target, memory)
        out = gpu.download(target, gpu.pinned(64))
        assert out.sum() == np.arange(64).sum()
        with pytest.raises(BackendError, match=r"uint8\(64,\) cannot be read into int8\(64,\)"):
            gpu.download(target, out.view(np.int8))


def test_memory_is_pooled_and_errors_are_in_the_drivers_words(runtime):
    with backend_with(runtime)() as gpu:
        address = gpu.alloc((100,), np.float32).address
        assert gpu.alloc((110,), np.float32).address == address
        with pytest.raises(
            BackendError, match=r"Fake Radeon \(gfx1151\) has no .* memory left: out of memory \(2\)"
        ):
            gpu.alloc((1 << 41,), np.uint8)


def use(gpu):
    """Take one of everything that a back end gives back."""
    h, x = gpu.upload(np.zeros(300, np.float32)), gpu.upload(np.ones(300, np.float32))
    first = gpu.mark()
    ops.add(gpu, h, x)
    gpu.seconds_between(first, gpu.mark())
    gpu.pinned(64)
    gpu.alloc((1 << 22,), np.uint8)
    return gpu.library.function("fake_held")


@pytest.mark.parametrize("own_stream", [False, True])
def test_closing_gives_everything_back(runtime, hipcc, own_stream):
    gpu = backend_with(runtime)(own_stream=own_stream)
    held = use(gpu)
    before = held()
    assert before >= 6 + own_stream
    gpu.close()
    assert held() == before - (6 + own_stream)
    gpu.close()
    assert held() == before - (6 + own_stream)


@pytest.mark.parametrize(
    "call", ["hipFree", "hipHostFree", "hipEventDestroy", "hipModuleUnload", "hipStreamDestroy"]
)
def test_what_fails_in_closing_is_told_and_the_rest_is_given_back(runtime, hipcc, monkeypatch, call):
    gpu = backend_with(runtime)(own_stream=True)
    held = use(gpu)
    before, kept = held(), {"hipFree": 2, "hipEventDestroy": 2}.get(call, 1)
    monkeypatch.setenv("FAKE_HIP_KEEPS", call)
    with pytest.raises(BackendError, match=rf"{call} failed on Fake Radeon \(gfx1151\): some error \(719\)"):
        gpu.close()
    assert held() == before - 7 + kept


def test_an_error_of_closing_does_not_hide_the_one_before_it(runtime, hipcc, monkeypatch):
    with pytest.raises(ValueError, match="first") as caught, backend_with(runtime)() as gpu:
        gpu.pinned(64)
        monkeypatch.setenv("FAKE_HIP_KEEPS", "hipHostFree")
        raise ValueError("first")
    assert "hipHostFree failed" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("int other(void) { return 0; }", "has no function hipInit"),
        ("int hipInit(unsigned f) { return 0; }", "has no function hipGetDeviceCount"),
        ("int hipInit(unsigned f) { return 0; } int hipGetDeviceCount(int *n) { return *n = 1, 0; }",
         "has no function hipSetDevice"),
    ],
)  # fmt: skip
def test_a_library_that_lacks_a_function_is_named_with_it(tmp_path, source, says):
    library = tmp_path / "libamdhip64.so"
    (tmp_path / "k.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "k.c"), "-o", str(library)], check=True)
    kind = backend_with(str(library))
    assert kind.available() == ("GetDeviceCount" in source)
    with pytest.raises(BackendError) as caught:
        kind()
    assert f"{library} {says}" in str(caught.value)
