"""Launches that do not fit their kernel are refused before anything runs; buffers keep shape, dtype and content."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.forward import ops
from mq_quant.kernels.runtime import host
from mq_quant.kernels.runtime.host import open_backend


@pytest.fixture
def cpu():
    with open_backend("cpu", threads=1) as backend:
        yield backend


@pytest.fixture
def launch(cpu):
    """Launch `add`(float* h, const float* x, int64_t n) on ones, with some of it replaced."""

    def run(kernel="add", grid=(1,), block=(256,), lds=0, **args):
        h, x = cpu.upload(np.ones(4, np.float32)), cpu.upload(np.ones(4, np.float32))
        values = {"h": h, "x": x, "n": 4} | args
        cpu.launch(cpu.kernel(kernel), grid, block, tuple(values.values()), lds)
        return cpu.download(h)

    return run


def test_a_launch_that_fits_runs(launch):
    assert launch().tolist() == [2, 2, 2, 2]
    assert launch(n=np.int64(2)).tolist() == [2, 2, 1, 1]
    assert launch(grid=(0,)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"more": 1}, r"takes \(h, x, n\), and was given 4 arguments"),
        ({"n": 4.0}, "argument n of kernel add is a int64, not 4.0"),
        ({"n": True}, "argument n of kernel add is a int64, not bool"),
        ({"n": 2**63}, "which 9223372036854775808 does not fit"),
        ({"x": 7}, "argument x of kernel add is a float32 buffer, not int"),
        ({"x": None}, "argument x of kernel add is a float32 buffer, not NoneType"),
        ({"block": (33,)}, "whole waves of 32"),
        ({"block": (512,)}, "up to 256 threads, not 512"),
        ({"block": (0,)}, "not 0"),
        ({"grid": (1, 70000)}, "cannot run on grid"),
        ({"grid": (-1,)}, "cannot run on grid"),
        ({"grid": (1, 1, 1, 1)}, "cannot run on grid"),
        ({"lds": 1 << 20}, "1048576 bytes of LDS"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(launch, wrong, message):
    with pytest.raises(BackendError, match=message):
        launch(**wrong)


def test_a_buffer_of_another_dtype_or_back_end_is_refused(cpu, launch):
    with pytest.raises(BackendError, match="argument x of kernel add is a float32 buffer, not float64"):
        launch(x=cpu.upload(np.ones(4)))
    with (
        open_backend("cpu", threads=1) as other,
        pytest.raises(BackendError, match="a buffer of back end cpu was given"),
    ):
        launch(x=other.upload(np.ones(4, np.float32)))


def test_kernels_that_do_not_exist_are_named(cpu):
    with pytest.raises(BackendError, match="no kernel matvec for format MQ5"):
        cpu.kernel("matvec", "MQ5")
    with pytest.raises(BackendError, match="no kernel matvec"):
        cpu.kernel("matvec")
    with pytest.raises(BackendError, match="no kernel add for format MQ4"):
        cpu.kernel("add", "MQ4")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32])
def test_buffers_give_back_what_was_written(backend, rng, dtype):
    array = rng.integers(0, 100, (5, 3, 2)).astype(dtype)
    buffer = backend.upload(array)
    assert (buffer.shape, buffer.nbytes) == ((5, 3, 2), array.nbytes)
    assert np.array_equal(backend.download(buffer), array)
    assert np.array_equal(backend.download(buffer.reshape(6, 5)), array.reshape(6, 5))
    assert np.array_equal(backend.download(buffer.rows(1, 3)), array[1:3])
    backend.write(buffer, array[:1] * 0, offset=6)
    array[1] = 0
    assert np.array_equal(backend.download(buffer), array)
    other = backend.alloc((30,), dtype)
    backend.copy(other, buffer)
    assert np.array_equal(backend.download(other), array.reshape(-1))


def test_arrays_that_are_not_contiguous_are_uploaded_in_order(backend, rng):
    array = rng.standard_normal((4, 6)).astype(np.float32)
    assert np.array_equal(backend.download(backend.upload(array.T)), array.T)


def test_writes_and_views_outside_a_buffer_are_refused(cpu):
    buffer = cpu.alloc((4, 2), np.float32)
    with pytest.raises(BackendError, match=r"float32\[3\] does not fit a buffer of float32\[8\] at 6"):
        cpu.write(buffer, np.ones(3, np.float32), offset=6)
    with pytest.raises(BackendError, match="does not fit"):
        cpu.write(buffer, np.ones(3, np.float64))
    with pytest.raises(BackendError, match="rows 2:5 are outside"):
        buffer.rows(2, 5)
    with pytest.raises(BackendError, match="cannot be read as"):
        buffer.reshape(3, 3)
    with pytest.raises(BackendError, match="cannot be copied"):
        cpu.copy(buffer, cpu.alloc((7,), np.float32))


def test_memory_is_given_back_and_used_again(backend):
    """Many more buffers than memory holds, each dropped."""
    for _ in range(200):
        backend.alloc((1 << 28,), np.uint8) if backend.name != "cpu" else backend.alloc((1 << 20,), np.uint8)
    seen = {backend.alloc((64,), np.float32).address for _ in range(50)}
    assert len(seen) < 50 or backend.name == "cpu"


def test_fresh_cpu_buffers_are_nan(cpu):
    assert np.isnan(cpu.download(cpu.alloc((100,), np.float32))).all()


def test_marks_tell_time_forwards(backend):
    first = backend.mark()
    backend.synchronize()
    assert backend.seconds_between(first, backend.mark()) >= 0


def test_auto_opens_the_first_back_end_that_has_a_device(monkeypatch):
    order = []
    for name in ("hip", "cuda"):
        kind = host._load(name)
        monkeypatch.setattr(kind, "available", classmethod(lambda cls: order.append(cls.name) or False))
    with open_backend("auto", threads=1) as backend:
        assert backend.name == "cpu"
    assert order == ["hip", "cuda"]


def test_a_back_end_that_does_not_exist_is_refused():
    with pytest.raises(BackendError, match="no back end 'opencl'\n  choose one of auto, hip, cuda, cpu"):
        open_backend("opencl")


def test_what_is_recorded_happens_at_each_call_and_not_before(cpu):
    x, y = (cpu.upload(np.full(8, n, np.float32)) for n in (1, 2))

    def work():
        ops.add(cpu, x, y)
        cpu.copy(y, x)

    again = cpu.record(work)
    assert cpu.download(x)[0] == 1
    again()
    assert cpu.download(x)[0] == cpu.download(y)[0] == 3
    again()
    assert cpu.download(x)[0] == cpu.download(y)[0] == 6


def test_memory_that_is_taken_while_launches_are_recorded_holds_what_it_was_given(cpu):
    x, taken = cpu.upload(np.ones(8, np.float32)), []

    def work():
        taken.append(cpu.upload(np.full(8, 2, np.float32)))
        ops.add(cpu, x, taken[0])

    again = cpu.record(work)
    assert cpu.download(x)[0] == 1 and cpu.download(taken[0])[0] == 2
    again()
    again()
    assert cpu.download(x)[0] == 5


@pytest.mark.parametrize("what", ["arrays are copied", "another recording begins"])
def test_a_recording_takes_no_arrays(cpu, what):
    x = cpu.upload(np.zeros(8, np.float32))
    does = {
        "arrays are copied": lambda: cpu.write(x, np.ones(8, np.float32)),
        "another recording begins": lambda: cpu.record(lambda: None),
    }[what]
    with pytest.raises(BackendError, match=f"{what} while launches are recorded"):
        cpu.record(does)
    cpu.write(x, np.ones(8, np.float32))
    assert cpu.download(x)[0] == 1


def test_memory_that_somebody_else_took_is_a_buffer_too(cpu):
    array = np.arange(8, dtype=np.float32)
    borrowed = cpu.borrowed(array, array.ctypes.data, (2, 4), np.float32)
    assert np.array_equal(cpu.download(borrowed), array.reshape(2, 4))
