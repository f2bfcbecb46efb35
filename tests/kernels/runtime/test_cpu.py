"""The CPU back end means what HIP means and refuses what a GPU would corrupt; its order check finds races."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.forward import ops
from mq_quant.kernels.runtime.cpu import CpuBackend, find_compiler
from mq_quant.kernels.runtime.sources import Sources

PROBES = r"""
#include "device.h"

KERNEL(64) coordinates(int32_t* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}

KERNEL(64) turn(float* out, const float* x) {
  HIP_DYNAMIC_SHARED(float, held)
  held[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = held[63 - threadIdx.x];
}

KERNEL(64) shuffles(int32_t* out) {
  const int t = threadIdx.x;
  out[t] = __shfl(t, 5);
  out[64 + t] = __shfl_xor(t, 3);
  out[128 + t] = __shfl_down(t, 4u);
}

KERNEL(64) fresh_lds(float* out) {
  LDS(float, held, 64);
  out[blockIdx.x * 64 + threadIdx.x] = held[threadIdx.x];
  held[threadIdx.x] = 1.0f;
}

KERNEL(64) half_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

KERNEL(64) half_shuffle(float* out) {
  if (threadIdx.x % 2 == 0) return;
  out[threadIdx.x] = __shfl_xor(1.0f, 1);
}

KERNEL(64) overrun(float* out) {
  LDS(float, held, 64);
  held[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = held[threadIdx.x];
}

KERNEL(64) greedy(float* out) {
  LDS(float, held, 20000);
  out[threadIdx.x] = held[threadIdx.x];
}

KERNEL(64) uneven(float* out) {
  if (threadIdx.x < 32) {
    LDS(float, held, 4);
    out[threadIdx.x] = held[0];
  }
}
"""


@pytest.fixture(params=["ascending", "descending"])
def probes(request, tmp_path):
    (tmp_path / "probes.hip").write_text(PROBES)
    with CpuBackend(Sources(tmp_path), threads=2, order=request.param) as cpu:
        yield cpu


def test_coordinates_of_three_dimensional_grids_and_blocks(probes):
    out = probes.alloc((24, 64), np.int32)
    probes.launch(probes.kernel("coordinates"), (2, 3, 4), (4, 8, 2), (out,))
    expected = np.arange(24)[:, None] * 1000 + np.arange(64)
    assert np.array_equal(probes.download(out), expected)


def test_dynamic_lds(probes):
    x = np.arange(320, dtype=np.float32)
    out = probes.alloc((5, 64), np.float32)
    probes.launch(probes.kernel("turn"), (5,), (64,), (out, probes.upload(x)), lds=256)
    assert np.array_equal(probes.download(out), x.reshape(5, 64)[:, ::-1])
    with pytest.raises(BackendError, match="wrote past the end of an LDS array"):
        probes.launch(probes.kernel("turn"), (5,), (64,), (out, probes.upload(x)), lds=128)


def test_shuffles_stay_within_a_warp(probes):
    out = probes.alloc((3, 64), np.int32)
    probes.launch(probes.kernel("shuffles"), (1,), (64,), (out,))
    t = np.arange(64)
    down = np.where(t % 32 + 4 > 31, t, t + 4)
    assert np.array_equal(probes.download(out), np.stack([t // 32 * 32 + 5, t ^ 3, down]))


def test_lds_is_poisoned_before_every_block(probes):
    out = probes.upload(np.zeros((40, 64), np.float32))
    probes.launch(probes.kernel("fresh_lds"), (40,), (64,), (out,))
    poison = {"ascending": 0xFFFFFFFF, "descending": 0x7E7E7E7E}[probes.order]
    assert (probes.download(out).view(np.uint32) == poison).all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("half_barrier", "a barrier or shuffle was not reached by every thread"),
        ("half_shuffle", "a barrier or shuffle was not reached by every thread"),
        ("overrun", "wrote past the end of an LDS array"),
        ("greedy", "more than 64 KiB of LDS"),
        ("uneven", "threads of a block took different LDS arrays"),
    ],
)
def test_what_a_gpu_would_hang_on_or_corrupt_is_reported(probes, kernel, message):
    out = probes.alloc((64,), np.float32)
    with pytest.raises(BackendError, match=f"kernel {kernel} failed on the CPU: .*{message}"):
        probes.launch(probes.kernel(kernel), (3,), (64,), (out,))
    probes.launch(probes.kernel("fresh_lds"), (1,), (64,), (out,))


def pipeline(cpu, payload):
    """Bytes of every activation of a small layer: attention, then a mixture of experts in two formats."""
    rng = np.random.default_rng(3)
    tokens, hidden, inter, heads, count, slots = 3, 512, 256, 4, 6, 3

    def normal(*shape):
        return cpu.upload(rng.standard_normal(shape).astype(np.float32))

    def mat(fmt, rows, cols):
        return ops.matrix(cpu, payload(fmt, rows * cols, rng), fmt, rows, cols)

    def moe(fmt, rows, cols):
        size = BY_NAME[fmt].nbytes(rows * cols)
        data = cpu.upload(payload(fmt, rows * cols * count, rng))
        return ops.experts(cpu, data, np.arange(count) * size, fmt, rows, cols)

    positions = cpu.upload(np.arange(tokens, dtype=np.int32) + 130)
    table = mat("Q8F16", 20, hidden)
    h = ops.embed(cpu, table, cpu.upload(np.array([3, 19, 0], np.int32)))
    t = ops.rmsnorm(cpu, h, normal(hidden), 1e-6)
    q = ops.matvec(cpu, mat("Q8F16", heads * 128, hidden), t)
    k, v = (ops.matvec(cpu, mat("Q8F16", 128, hidden), t) for _ in range(2))
    cos, sin = (cpu.upload(a) for a in ops.rope_tables(140, 64, 1e4))
    ops.rope(cpu, q, cos, sin, positions, 128)
    caches = normal(140, 128), normal(140, 128)
    ops.kv_append(cpu, *caches, k, v, positions)
    attended = ops.attention(cpu, q, *caches, positions, 128)
    ops.add(cpu, h, ops.matvec(cpu, mat("Q8F16", hidden, heads * 128), attended))
    ids, weights = ops.router_top_k(cpu, ops.matvec(cpu, mat("F32", count, hidden), h), normal(count), slots)
    signs = ops.signs(cpu)
    x = ops.scale_rotate(cpu, h, normal(hidden), signs)
    gate, up = ops.expert_gate_up(
        cpu, moe("MQ3-Lloyd", inter, hidden), moe("MQ3-Lloyd", inter, hidden), ids, x
    )
    down = ops.expert_down(cpu, moe("MQ4", hidden, inter), ids, ops.silu_mul_rotate(cpu, gate, up, signs))
    ops.combine(cpu, h, down, weights)
    return [cpu.download(b).tobytes() for b in (q, k, v, attended, ids, weights, x, gate, up, down, h)]


def test_a_layer_gives_the_same_bytes_for_any_order_and_number_of_threads(payload):
    results = []
    for order, threads in (("ascending", 1), ("descending", 1), ("ascending", 2), ("descending", 5)):
        with CpuBackend(threads=threads, order=order) as cpu:
            results += [pipeline(cpu, payload), pipeline(cpu, payload)]
    assert all(r == results[0] for r in results)


def attention_case(cpu, rng):
    q, keys, values = (cpu.upload(rng.standard_normal((n, 128)).astype(np.float32)) for n in (1, 300, 300))
    return cpu.download(ops.attention(cpu, q, keys, values, cpu.upload(np.array([299], np.int32)), 128))


def rmsnorm_case(cpu, rng):
    x = cpu.upload(rng.standard_normal((2, 768)).astype(np.float32))
    return cpu.download(ops.rmsnorm(cpu, x, cpu.upload(np.ones(768, np.float32)), 1e-6))


def lloyd_case(cpu, rng):
    """Rows long enough that x goes through LDS more than once."""
    levels = np.sort(rng.standard_normal((5 * 33, 4)), axis=1).astype(np.float16)
    codes = rng.integers(0, 4, (5 * 33, 256)).astype(np.uint8)
    data = BY_NAME["MQ2-Lloyd"].pack(levels, codes)
    w = ops.matrix(cpu, data, "MQ2-Lloyd", 5, 256 * 33)
    x = rng.standard_normal((1, 256 * 33)).astype(np.float32)
    return cpu.download(ops.matvec(cpu, w, cpu.upload(x)))


BARRIER = "__syncthreads();"
RACES = {
    "weights read before they are written": ("attention.hip", "weight[tid] = p;", attention_case),
    "sums read before they are written": ("device.h", "scratch[wave()] = v;", rmsnorm_case),
    "x read before it is staged": ("matrix.hip", "stage_x(staged, x, first, share.groups);", lloyd_case),
    "x replaced while it is read": ("matrix.hip", "if (Dot::STAGE > 0 && first > 0)", lloyd_case),
}


def without_barrier(text, behind):
    """The text without the first barrier that follows `behind`."""
    at = text.index(BARRIER, text.index(behind))
    return text[:at] + ";" + text[at + len(BARRIER) :]


@pytest.mark.parametrize("race", RACES)
def test_a_missing_barrier_shows_as_a_difference_between_orders(tmp_path, race):
    file, behind, case = RACES[race]
    for name in ("device.h", "formats.h", "matrix.hip", "vector.hip", "attention.hip"):
        shutil.copy(Sources().path(name), tmp_path / name)

    def outcomes(sources):
        out = []
        for order in ("ascending", "descending"):
            with CpuBackend(sources, threads=1, order=order) as cpu:
                out.append(case(cpu, np.random.default_rng(1)).tobytes())
        return out

    first, second = outcomes(Sources(tmp_path))
    assert first == second
    (tmp_path / file).write_text(without_barrier((tmp_path / file).read_text(), behind))
    first, second = outcomes(Sources(tmp_path))
    assert first != second


def test_an_order_that_does_not_exist_is_refused():
    with pytest.raises(BackendError, match="no fiber order 'random'"):
        CpuBackend(order="random")


def test_a_source_that_does_not_compile_says_why(tmp_path):
    (tmp_path / "k.hip").write_text('#include "device.h"\nKERNEL(32) k(int n) { nonsense; }\n')
    with (
        CpuBackend(Sources(tmp_path), threads=1) as cpu,
        pytest.raises(BackendError, match=r"k\.hip does not compile for the CPU(.|\n)*nonsense"),
    ):
        cpu.launch(cpu.kernel("k"), (1,), (32,), (1,))


def test_the_compiler_is_cxx_where_it_is_set(monkeypatch):
    monkeypatch.setenv("CXX", "ccache my-g++ -m64")
    assert find_compiler() == ("ccache", "my-g++", "-m64")


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"no C\+\+ compiler\n  install g\+\+"):
        find_compiler()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "ziglang" else None)
    assert find_compiler()[1:] == ("-m", "ziglang", "c++")


def test_a_compiler_that_cannot_be_run_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="no-such-compiler cannot be run"):
        CpuBackend(threads=1)


def test_the_compiler_may_lie_in_any_folder_and_have_flags(monkeypatch, tmp_path):
    folder = tmp_path / "my tools"
    folder.mkdir()
    tool, log = folder / "cc", tmp_path / "log"
    tool.write_text(f'#!/bin/sh\necho "$TMPDIR $@" >>{log}\nexec c++ "$@"\n')
    tool.chmod(0o755)
    (tmp_path / "probes.hip").write_text(PROBES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cleaned away"))
    monkeypatch.setenv("CXX", f"'{tool}' -O1")
    assert find_compiler() == (str(tool), "-O1")
    with CpuBackend(Sources(tmp_path), threads=1) as cpu:
        cpu.launch(cpu.kernel("shuffles"), (1,), (64,), (cpu.alloc((3, 64), np.int32),))
    lines = [line for line in log.read_text().splitlines() if "--version" not in line]
    assert len(lines) == 2
    assert all(
        line.startswith(f"{tmp_path}/cache/mq-quant/kernels/.build-") and " -O1 " in line for line in lines
    )


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    with pytest.raises(BackendError, match="/no/such/compiler cannot be run: No such file"):
        CpuBackend()


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    """As on a file system from which no code may run: what was built is whole, and the loader refuses it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tool = tmp_path / "cc"
    tool.write_text(
        '#!/bin/sh\nwhile [ $# != 0 ] && [ "$1" != -o ]; do shift; done\ntest $# = 0 || echo no >"$2"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tool))
    with pytest.raises(BackendError, match=r"cpu-\w+\.so: compiled kernels cannot be loaded"):
        CpuBackend()


def test_blocks_run_on_as_many_threads_as_the_machine_allows(monkeypatch):
    monkeypatch.setattr("mq_quant.kernels.runtime.cpu.cores", lambda: 3)
    with CpuBackend() as cpu:
        assert cpu.threads == 3
