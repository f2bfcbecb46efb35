"""Products that count bits (bits.h), with tiles of bits made of shuffles: what NVIDIA GPUs do, where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from counted_cpu import FORMATS, counting
from mq_quant.formats.blocks import BY_NAME
from mq_quant.kernels.forward import ops


@pytest.fixture(scope="module", params=["ascending", "descending"])
def counts(request, tmp_path_factory):
    with counting(tmp_path_factory.mktemp("counts"), request.param) as opened:
        yield opened


def product(backend, data, fmt, rows, x):
    w = ops.matrix(backend, data, fmt, rows, x.shape[1])
    return backend.download(ops.matvec(backend, w, backend.upload(x)))


@pytest.mark.parametrize("case", ["random", "zero", "constant", "subnormal"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (67, 768), (5, 256 * 13)])
def test_counts_give_the_product(counts, payload, rng, fmt, rows, cols, case):
    data = payload(fmt, rows * cols, rng, case)
    x = rng.standard_normal((2, cols)).astype(np.float32)
    w = BY_NAME[fmt].decode(data).reshape(rows, cols).astype(np.float64)
    got = product(counts, data, fmt, rows, x)
    assert np.all(np.abs(got - x @ w.T) <= 2e-6 * (np.abs(x) @ np.abs(w).T) + 1e-37)


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1.0, 1e30])
def test_x_of_any_size_keeps_its_precision(counts, payload, rng, size):
    """A group's unit follows its largest element; what is subnormal in f32 stays as exact as f32 has it."""
    data = payload("MQ2-Lloyd", 256, rng)
    x = (rng.standard_normal((1, 256)) * size).astype(np.float32)
    w = BY_NAME["MQ2-Lloyd"].decode(data).reshape(1, 256).astype(np.float64)
    exact, scale = x.astype(np.float64) @ w.T, np.abs(x).astype(np.float64) @ np.abs(w).T
    assert np.all(np.abs(product(counts, data, "MQ2-Lloyd", 1, x) - exact) <= 2e-6 * scale + 1e-44)


def test_a_largest_element_just_below_a_power_of_two(counts, payload, rng):
    """Rounded to units, it would be the power of two, which has a bit more."""
    data = payload("MQ3-Lloyd", 256, rng)
    w = BY_NAME["MQ3-Lloyd"].decode(data).reshape(1, 256).astype(np.float64)
    for sign in (1, -1):
        x = np.full((1, 256), np.nextafter(np.float32(sign * 2.0), np.float32(0)))
        exact, scale = x.astype(np.float64) @ w.T, np.abs(x).astype(np.float64) @ np.abs(w).T
        assert np.all(np.abs(product(counts, data, "MQ3-Lloyd", 1, x) - exact) <= 2e-6 * scale)


def test_a_small_element_beside_a_large_one_keeps_half_its_bits(counts, payload, rng):
    data = payload("MQ3-Lloyd", 256, rng)
    w = BY_NAME["MQ3-Lloyd"].decode(data).reshape(256).astype(np.float64)
    x = np.zeros((1, 256), np.float32)
    x[0, 7], x[0, 200] = 1000.0, 0.001234567
    large = np.where(np.arange(256) == 7, x[0], 0).astype(np.float32)[None]
    both, one = (product(counts, data, "MQ3-Lloyd", 1, v)[0, 0] for v in (x, large))
    assert abs(both - (1000.0 * w[7] + 0.001234567 * w[200])) <= 2e-6 * 1000 * abs(w[7]) + 1e-8
    assert abs(one - 1000.0 * w[7]) <= 2e-6 * 1000 * abs(w[7])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_a_number_stays_none(counts, payload, rng, value):
    data = payload("MQ2-Lloyd", 256, rng)
    x = rng.standard_normal((1, 256)).astype(np.float32)
    x[0, 3] = value
    assert not np.isfinite(product(counts, data, "MQ2-Lloyd", 1, x)).any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_experts_by_counts(counts, payload, rng, fmt):
    rows, cols, count = 37, 512, 3
    size = BY_NAME[fmt].nbytes(rows * cols)
    data = payload(fmt, rows * cols * count, rng)
    held = ops.experts(counts, counts.upload(data), np.arange(count) * size, fmt, rows, cols)
    w = BY_NAME[fmt].decode(data).reshape(count, rows, cols).astype(np.float64)
    ids = np.array([[2, 0], [1, 1]], np.int32)
    x = rng.standard_normal((2, cols)).astype(np.float32)
    gate, up = ops.expert_gate_up(counts, held, held, counts.upload(ids), counts.upload(x))
    exact = np.einsum("tsrc,tc->tsr", w[ids], x)
    scale = np.einsum("tsrc,tc->tsr", np.abs(w[ids]), np.abs(x))
    for got in (counts.download(gate), counts.download(up)):
        assert np.all(np.abs(got - exact) <= 2e-6 * scale)
