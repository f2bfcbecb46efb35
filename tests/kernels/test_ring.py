"""Expert products whose weights run through a ring in LDS (feed.h), with copies made as late as they may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.kernels import ops
from mq_quant.kernels.cpu import CpuBackend
from mq_quant.kernels.sources import FOLDER, Sources

RINGED = ("MQ2-Lloyd", "MQ3-Lloyd")
HERE = Path(__file__).parent
BYTES = 43008
"""Dynamic LDS for the rings of a block, of 256 threads so that they fit."""


class RingBackend(CpuBackend):
    def _dispatch(self, kernel, grid, block, values, lds):
        super()._dispatch(kernel, grid, block, values, lds + BYTES * kernel.name.startswith("expert"))


@pytest.fixture(scope="module", params=["ascending", "descending"])
def order(request):
    return request.param


@pytest.fixture(scope="module")
def plain(order):
    with CpuBackend(order=order) as opened:
        yield opened


@pytest.fixture(scope="module")
def rings(order, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rings")
    (folder / "matrix.hip").write_text(
        (FOLDER / "matrix.hip").read_text().replace("KERNEL(384)", "KERNEL(256)")
    )
    (folder / "device.h").write_text((FOLDER / "device.h").read_text() + '\n#include "ring_on_cpu.h"\n')
    (folder / "ring_on_cpu.h").write_text((HERE / "ring_on_cpu.h").read_text())
    with RingBackend(sources=Sources(folder), order=order) as opened:
        yield opened


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


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("fmt", RINGED)
@pytest.mark.parametrize(
    ("rows", "cols", "start"),
    [(192, 1536, 0), (5, 512, 16), (300, 256 * 14, 0), (100, 256 * 3, 0), (97, 512, 8)],
    ids=["whole blocks", "few rows", "x in two parts", "an odd number of groups", "between multiples of 16"],
)
def test_a_ring_gives_the_bits_of_direct_loads(plain, rings, payload, fmt, rows, cols, start, turns):
    data = payload(fmt, rows * cols * 3, np.random.default_rng(1))
    ids = np.array([[2, 0], [1, 1]], np.int32)
    rings.turns = turns
    args = (fmt, rows, cols, data, start, ids)
    expected = products(plain, *args, np.random.default_rng(2))
    got = products(rings, *args, np.random.default_rng(2))
    for a, b in zip(got, expected, strict=True):
        assert np.isfinite(a).all()
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("fmt", RINGED)
def test_an_expert_that_is_not_there_gives_nan(rings, payload, rng, fmt):
    data = payload(fmt, 8 * 512, rng)
    rings.turns = 2
    gate, up, down = products(rings, fmt, 8, 512, data, 0, np.array([[0, 1, -1]], np.int32), rng)
    for got in (gate, up, down):
        assert np.isfinite(got[0, 0]).all()
        assert np.isnan(got[0, 1:]).all()
