"""Expert products whose rows come through LDS (feed.h), with copies made as late as they may be."""

from __future__ import annotations

import numpy as np
import pytest
from counted_cpu import FORMATS, counting
from mq_quant.formats.blocks import BY_NAME
from mq_quant.kernels.forward import ops
from mq_quant.kernels.forward.geometry import COPYING_WAVES
from mq_quant.kernels.runtime.cuda import CudaBackend

WAVES = 2
"""Of a block, so that its rows fit into the 64 KiB of the CPU's LDS."""


@pytest.fixture(scope="module", params=["ascending", "descending"])
def order(request):
    return request.param


@pytest.fixture(scope="module")
def plain(order, tmp_path_factory):
    with counting(tmp_path_factory.mktemp("plain"), order) as opened:
        yield opened


@pytest.fixture(scope="module")
def copying(order, tmp_path_factory):
    with counting(tmp_path_factory.mktemp("copies"), order, copies=True) as opened:
        opened.most_lds = 40 << 10
        yield opened


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(ops, "COPYING_WAVES", dict.fromkeys(COPYING_WAVES, WAVES))


def products(backend, fmt, rows, cols, data, start, ids, rng):
    """(gate, up, down) of the experts `ids`, whose matrices lie at `start` and behind it."""
    size, count = BY_NAME[fmt].nbytes(rows * cols), len(data) // BY_NAME[fmt].nbytes(rows * cols)
    at = start + np.arange(count) * size
    held = backend.upload(np.concatenate([np.zeros(start, np.uint8), data]))
    first = ops.experts(backend, held, at, fmt, rows, cols)
    second = ops.experts(backend, held, at[::-1].copy(), fmt, rows, cols)
    tokens, slots = ids.shape
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    routed = backend.upload(ids)
    gate, up = ops.expert_gate_up(backend, first, second, routed, backend.upload(x))
    y = rng.standard_normal((tokens, slots, cols)).astype(np.float32)
    down = ops.expert_down(backend, second, routed, backend.upload(y))
    return [backend.download(b) for b in (gate, up, down)]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("rows", "cols", "start"),
    [(192, 1536, 0), (5, 512, 16), (300, 256 * 14, 0), (100, 256 * 3, 0), (97, 512, 8), (70, 256 * 12, 0)],
    ids=[
        "whole blocks",
        "few rows",
        "x in two parts",
        "an odd number of groups",
        "between multiples of 16",
        "more than LDS holds",
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_copies_give_the_bits_of_direct_loads(plain, copying, payload, fmt, rows, cols, start):
    data = payload(fmt, rows * cols * 3, np.random.default_rng(1))
    ids = np.array([[2, 0], [1, 1]], np.int32)
    args = (fmt, rows, cols, data, start, ids)
    expected = products(plain, *args, np.random.default_rng(2))
    got = products(copying, *args, np.random.default_rng(2))
    for a, b in zip(got, expected, strict=True):
        assert np.isfinite(a).all()
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.usefixtures("small_blocks")
def test_rows_are_copied_where_they_fit(copying, payload, rng, monkeypatch):
    """Otherwise the test above would compare direct loads with themselves."""
    given = []
    launch = type(copying).launch
    monkeypatch.setattr(
        type(copying), "launch", lambda self, *args: (given.append(args[4]), launch(self, *args))
    )
    for fmt in FORMATS:
        data = payload(fmt, 96 * 1536, rng)
        products(copying, fmt, 96, 1536, data, 0, np.zeros((1, 1), np.int32), rng)
    group = {fmt: 16 * WAVES * BY_NAME[fmt].nbytes(256) for fmt in FORMATS}
    assert given == [6 * group["MQ2-Lloyd"]] * 2 + [6 * group["MQ3-Lloyd"]] * 2


@pytest.mark.usefixtures("small_blocks")
def test_both_matrices_of_a_product_need_to_be_aligned(plain, copying, payload):
    """Copies of runs fail on a GPU, and trap here, where one does not begin at a multiple of 16 bytes."""
    data = payload("MQ2-Lloyd", 40 * 512, np.random.default_rng(1))
    shifted = np.concatenate([np.zeros(8, np.uint8), data])
    x = np.random.default_rng(2).standard_normal((1, 512)).astype(np.float32)
    results = []
    for backend in (plain, copying):
        w1 = ops.experts(backend, backend.upload(data), [0], "MQ2-Lloyd", 40, 512)
        w3 = ops.experts(backend, backend.upload(shifted), [8], "MQ2-Lloyd", 40, 512)
        ids = backend.upload(np.zeros((1, 1), np.int32))
        for pair in ((w1, w3), (w3, w1)):
            results.append(
                [backend.download(b) for b in ops.expert_gate_up(backend, *pair, ids, backend.upload(x))]
            )
    assert all(np.array_equal(a, results[0][0]) for result in results for a in result)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.usefixtures("small_blocks")
def test_an_expert_that_is_not_there_gives_nan(copying, payload, rng, fmt):
    data = payload(fmt, 8 * 512, rng)
    gate, up, down = products(copying, fmt, 8, 512, data, 0, np.array([[0, 1, -1]], np.int32), rng)
    for got in (gate, up, down):
        assert np.isfinite(got[0, 0]).all()
        assert np.isnan(got[0, 1:]).all()


class DirectBackend(CudaBackend):
    def lds_for_copies(self, kernel):
        return 0


@pytest.mark.skipif(not CudaBackend.available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("rows", "cols", "start"), [(1536, 3072, 0), (3072, 1536, 0), (300, 256 * 14, 0), (97, 512, 8)]
)
def test_copies_on_a_gpu_give_the_bits_of_direct_loads(payload, fmt, rows, cols, start):
    data = payload(fmt, rows * cols * 3, np.random.default_rng(1))
    args = (fmt, rows, cols, data, start, np.array([[2, 0], [1, 1]], np.int32))
    with CudaBackend() as copying, DirectBackend() as direct:
        got, again, expected = (
            products(backend, *args, np.random.default_rng(2)) for backend in (copying, copying, direct)
        )
    for a, b, c in zip(got, again, expected, strict=True):
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))
        assert np.array_equal(a.view(np.uint32), c.view(np.uint32))
