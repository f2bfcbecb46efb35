"""Expert products whose rows come through LDS (stream.h, feed.h), with copies made as late as they may be."""

from __future__ import annotations

import numpy as np
import pytest
from counted_cpu import counting
from mq_quant.formats.blocks import BY_NAME
from mq_quant.kernels.forward import geometry, ops
from mq_quant.kernels.runtime.cuda import CudaBackend

FORMATS = tuple(geometry.WAVE_ROWS)
GROUPS, SHARE, LDS = 10, 3, 45_600
"""Groups of a row and of a wave, and bytes for the copies of a block, at most: its LDS is to fit into 64 KiB."""


@pytest.fixture(scope="module", autouse=True)
def small_stages():
    """Set before the kernels are built, which have these numbers too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(geometry.CONSTANTS, "SHARE", SHARE)
        patch.setattr(ops, "SHARE", SHARE)
        patch.setattr(ops, "CHUNK", GROUPS)
        yield


@pytest.fixture(scope="module", params=["ascending", "descending"])
def order(request):
    return request.param


@pytest.fixture(scope="module")
def copying(order, tmp_path_factory):
    with counting(tmp_path_factory.mktemp("copies"), order, copies=True) as opened:
        opened.most_lds = LDS
        yield opened


@pytest.fixture
def launches(copying, monkeypatch):
    """(blocks, bytes of dynamic LDS) of every launch."""
    given, launch = [], type(copying).launch

    def note(self, kernel, grid, block, args, lds=0):
        given.append((int(np.prod(grid)), lds))
        launch(self, kernel, grid, block, args, lds)

    monkeypatch.setattr(type(copying), "launch", note)
    return given


def products(backend, fmt, rows, cols, data, start, ids, rng, size=1.0):
    """What experts `ids` give, whose matrices lie at `start` and behind it: (got, exact, Σ of absolute terms) for gate,
    up and down."""
    nbytes = BY_NAME[fmt].nbytes(rows * cols)
    count = len(data) // nbytes
    at = start + np.arange(count) * nbytes
    held = backend.upload(np.concatenate([np.zeros(start, np.uint8), data]))
    first = ops.experts(backend, held, at, fmt, rows, cols)
    second = ops.experts(backend, held, at[::-1].copy(), fmt, rows, cols)
    w = BY_NAME[fmt].decode(data).reshape(count, rows, cols).astype(np.float64)
    tokens, slots = ids.shape
    x = (size * rng.standard_normal((tokens, cols))).astype(np.float32)
    y = (size * rng.standard_normal((tokens, slots, cols))).astype(np.float32)
    routed = backend.upload(ids)
    gate, up = ops.expert_gate_up(backend, first, second, routed, backend.upload(x))
    down = ops.expert_down(backend, second, routed, backend.upload(y))
    cases = ((gate, w[ids], "tc"), (up, w[::-1][ids], "tc"), (down, w[::-1][ids], "tsc"))
    return [
        (
            backend.download(got),
            np.einsum(f"tsrc,{axes}->tsr", v, x if axes == "tc" else y),
            np.einsum(f"tsrc,{axes}->tsr", np.abs(v), np.abs(x if axes == "tc" else y)),
        )
        for got, v, axes in cases
    ]


def close(got, exact, scale):
    return np.all(np.abs(got - exact) <= 2e-6 * scale + 1e-37)


SHAPES = {
    "whole tiles": (192, 512, 0),
    "few rows": (5, 512, 16),
    "one group": (300, 256, 0),
    "as many groups as may be": (37, 256 * 10, 0),
    "two waves to a row": (50, 256 * 5, 16),
}
DIRECT = {
    "more groups than may be": (20, 256 * 11, 0),
    "between multiples of 16": (97, 512, 8),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_come_through_lds_give_the_product(copying, launches, payload, fmt, shape):
    rows, cols, start = SHAPES[shape]
    data = payload(fmt, rows * cols * 3, np.random.default_rng(1))
    ids = np.array([[2, 0], [1, 1], [0, 2]], np.int32)
    for case in products(copying, fmt, rows, cols, data, start, ids, np.random.default_rng(2)):
        assert close(*case)
    assert all(0 < lds <= LDS for _, lds in launches)
    assert launches[0][0] <= copying.multiprocessors


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", DIRECT)
def test_other_rows_come_directly(copying, launches, payload, fmt, shape):
    rows, cols, start = DIRECT[shape]
    data = payload(fmt, rows * cols * 3, np.random.default_rng(1))
    ids = np.array([[2, 0], [1, 1]], np.int32)
    for case in products(copying, fmt, rows, cols, data, start, ids, np.random.default_rng(2)):
        assert close(*case)
    assert not any(lds for _, lds in launches)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", ["zero", "constant", "subnormal"])
def test_extreme_payloads(copying, payload, fmt, case):
    data = payload(fmt, 24 * 512, np.random.default_rng(1), case)
    for got in products(copying, fmt, 24, 512, data, 0, np.zeros((1, 1), np.int32), np.random.default_rng(2)):
        assert close(*got)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_x_of_any_size_keeps_its_precision(copying, payload, fmt, size):
    data = payload(fmt, 8 * 512, np.random.default_rng(1))
    ids = np.zeros((1, 1), np.int32)
    for got, exact, scale in products(copying, fmt, 8, 512, data, 0, ids, np.random.default_rng(2), size):
        assert np.all(np.abs(got - exact) <= 2e-6 * scale + 1e-44)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_a_number_stays_none(copying, payload, fmt, value):
    w = ops.experts(
        copying, copying.upload(payload(fmt, 8 * 512, np.random.default_rng(1))), [0], fmt, 8, 512
    )
    x = np.ones((1, 1, 512), np.float32)
    x[..., 300] = value
    got = ops.expert_down(copying, w, copying.upload(np.zeros((1, 1), np.int32)), copying.upload(x))
    assert not np.isfinite(copying.download(got)).any()


def test_both_matrices_of_a_product_need_to_be_aligned(copying, launches, payload):
    """Copies of runs fail on a GPU, and trap here, where one does not begin at a multiple of 16 bytes."""
    data = payload("MQ2-Lloyd", 40 * 512, np.random.default_rng(1))
    shifted = np.concatenate([np.zeros(8, np.uint8), data])
    x = copying.upload(np.random.default_rng(2).standard_normal((1, 512)).astype(np.float32))
    w1 = ops.experts(copying, copying.upload(data), [0], "MQ2-Lloyd", 40, 512)
    w3 = ops.experts(copying, copying.upload(shifted), [8], "MQ2-Lloyd", 40, 512)
    ids = copying.upload(np.zeros((1, 1), np.int32))
    for pair in ((w1, w3), (w3, w1)):
        gate, up = (copying.download(b) for b in ops.expert_gate_up(copying, *pair, ids, x))
        assert np.array_equal(gate, up)
    assert not any(lds for _, lds in launches)


@pytest.mark.parametrize("fmt", FORMATS)
def test_an_expert_that_is_not_there_gives_nan(copying, payload, fmt):
    data = payload(fmt, 8 * 512, np.random.default_rng(1))
    w = ops.experts(copying, copying.upload(data), [0, -1], fmt, 8, 512)
    ids = copying.upload(np.array([[0, 1, -1, 2, 0]], np.int32))
    x = np.random.default_rng(2).standard_normal((1, 512)).astype(np.float32)
    gate, up = ops.expert_gate_up(copying, w, w, ids, copying.upload(x))
    down = ops.expert_down(copying, w, ids, copying.upload(np.stack([x] * 5, axis=1)))
    for got in map(copying.download, (gate, up, down)):
        assert np.isfinite(got[0, [0, 4]]).all()
        assert np.isnan(got[0, 1:4]).all()
        assert np.array_equal(got[0, 0], got[0, 4])


def mlp(backend, formats, hidden, inter, payload, tokens=3, slots=2, count=3, missing=()):
    """(what one call makes of x, what the launches one by one make of it), rotated and unrotated."""
    rng = np.random.default_rng(1)

    def experts(fmt, rows, cols, absent=()):
        at = np.arange(count) * BY_NAME[fmt].nbytes(rows * cols)
        at[list(absent)] = -1
        return ops.experts(
            backend, backend.upload(payload(fmt, count * rows * cols, rng)), at, fmt, rows, cols
        )

    gate_up, down = formats
    w1, w3 = (experts(gate_up, inter, hidden) for _ in range(2))
    w2, signs = experts(down, hidden, inter, missing), ops.signs(backend)
    ids = backend.upload(rng.integers(0, count, (tokens, slots)).astype(np.int32))
    x = backend.upload(rng.standard_normal((tokens, hidden)).astype(np.float32))
    for rotated in (True, False):
        gate, up = ops.expert_gate_up(backend, w1, w3, ids, x)
        r = ops.silu_mul_rotate(backend, gate, up, signs, rotated)
        yield (
            backend.download(ops.expert_mlp(backend, (w1, w3, w2), ids, x, signs, rotated)),
            backend.download(ops.expert_down(backend, w2, ids, r)),
        )


MLPS = [
    *((fmt, fmt, 512, 1024) for fmt in FORMATS),  # two waves to a row
    ("MQ2-Lloyd", "MQ3-Lloyd", 256, 256),  # blocks that need several rows of x, which LDS has room for
    ("MQ4", "MQ6", 256, 256 * 10),  # and those for which it has no room
    ("MQ3-Lloyd", "MQ4", 768, 256 * 11),  # down comes directly
]


@pytest.mark.parametrize(("gate_up", "down", "hidden", "inter"), MLPS)
def test_down_that_makes_the_activation_itself_gives_the_bits_of_two_launches(
    copying, launches, payload, gate_up, down, hidden, inter
):
    for one, other in mlp(copying, (gate_up, down), hidden, inter, payload):
        assert np.array_equal(one.view(np.uint32), other.view(np.uint32))
        assert np.isfinite(one).all()
    assert len(launches) == 2 * (5 if inter <= 256 * GROUPS else 6)


def test_an_expert_whose_down_is_not_there_gives_nan(copying, payload):
    for one, other in mlp(copying, ("MQ2-Lloyd", "MQ4"), 256, 512, payload, missing=[1]):
        assert np.isnan(one).any() and not np.isnan(one).all()
        assert np.array_equal(one.view(np.uint32), other.view(np.uint32))


class DirectBackend(CudaBackend):
    def lds_for_copies(self, kernel):
        return 0


@pytest.mark.skipif(not CudaBackend.available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("rows", "cols", "start"),
    [(1536, 3072, 0), (3072, 1536, 0), (300, 256 * 14, 0), (97, 512, 8), (300, 256, 0)],
)
def test_copies_on_a_gpu_give_the_product(payload, fmt, rows, cols, start):
    data = payload(fmt, rows * cols * 3, np.random.default_rng(1))
    args = (fmt, rows, cols, data, start, np.array([[2, 0], [1, 1]], np.int32))
    with CudaBackend() as copying, DirectBackend() as direct:
        got, again, other = (
            products(backend, *args, np.random.default_rng(2)) for backend in (copying, copying, direct)
        )
    for a, b, c in zip(got, again, other, strict=True):
        assert close(*a)
        assert close(*c)
        assert np.array_equal(a[0].view(np.uint32), b[0].view(np.uint32))


@pytest.mark.skipif(not CudaBackend.available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize(
    ("gate_up", "down"), [*((f, f) for f in FORMATS), ("MQ2-Lloyd", "MQ3-Lloyd"), ("MQ3-Lloyd", "MQ4")]
)
def test_on_a_gpu_down_makes_the_activation_itself(payload, gate_up, down, tokens):
    with CudaBackend() as backend:
        for one, other in mlp(backend, (gate_up, down), 3072, 1536, payload, tokens, slots=8, count=9):
            assert np.array_equal(one.view(np.uint32), other.view(np.uint32))
            assert np.isfinite(one).all()
