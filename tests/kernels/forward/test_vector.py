"""Norms, rotary embedding, rotation, activation, sums and routing against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.errors import BackendError
from mq_quant.formats.fwht import rotate
from mq_quant.kernels.forward import ops

SIZES = [256, 768, 3072]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", [1, 31, *SIZES])
def test_rmsnorm(backend, rng, n):
    x, weight = normal(rng, 3, n), normal(rng, n)
    x[1] = 0
    got = backend.download(ops.rmsnorm(backend, backend.upload(x), backend.upload(weight), 1e-6))
    exact = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + np.float32(1e-6)) * weight
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    assert not got[1].any()


@pytest.mark.parametrize(("head_dim", "rotary"), [(128, 64), (64, 64), (96, 20), (128, 2)])
def test_rope_rotates_pairs_across_halves_of_the_first_dimensions(backend, rng, head_dim, rotary):
    heads, positions = 3, np.array([0, 5, 99], np.int32)
    x = normal(rng, 3, heads * head_dim)
    cos, sin = ops.rope_tables(100, rotary, 5e6)
    buffer = backend.upload(x)
    ops.rope(
        backend,
        buffer,
        backend.upload(cos),
        backend.upload(sin),
        backend.upload(positions),
        head_dim,
    )
    got = backend.download(buffer).reshape(3, heads, head_dim)
    half = rotary // 2
    angle = positions[:, None] * 5e6 ** (-2.0 * np.arange(half) / rotary)
    pairs = x.reshape(3, heads, head_dim).astype(np.complex128)
    turned = (pairs[..., :half] + 1j * pairs[..., half:rotary]) * np.exp(1j * angle)[:, None, :]
    np.testing.assert_allclose(got[..., :half], turned.real, atol=2e-5)
    np.testing.assert_allclose(got[..., half:rotary], turned.imag, atol=2e-5)
    assert np.array_equal(got[..., rotary:], x.reshape(3, heads, head_dim)[..., rotary:])


@pytest.mark.parametrize("n", SIZES)
def test_scale_and_rotation_are_those_of_fwht_bit_for_bit(backend, rng, n):
    x, scale = normal(rng, 2, n), rng.uniform(0.5, 2, n).astype(np.float32)
    signs = ops.signs(backend)
    got = backend.download(ops.scale_rotate(backend, backend.upload(x), backend.upload(scale), signs))
    assert np.array_equal(got, rotate(x / scale))
    plain = ops.scale_rotate(backend, backend.upload(x), backend.upload(scale), signs, rotated=False)
    assert np.array_equal(backend.download(plain), x / scale)


@pytest.mark.parametrize("n", SIZES)
def test_silu_mul_rotate(backend, rng, n):
    gate, up = 4 * normal(rng, 2, 3, n), normal(rng, 2, 3, n)
    gate[0, 0, :4] = (0, -200, 200, -0.0)
    signs = ops.signs(backend)
    buffers = backend.upload(gate), backend.upload(up)
    with np.errstate(over="ignore"):
        product = (gate / (1 + np.exp(-gate.astype(np.float64))) * up).astype(np.float32)
    plain = backend.download(ops.silu_mul_rotate(backend, *buffers, signs, rotated=False))
    np.testing.assert_allclose(plain, product, rtol=1e-6, atol=1e-30)
    got = backend.download(ops.silu_mul_rotate(backend, *buffers, signs))
    assert np.array_equal(got, rotate(plain))


@pytest.mark.parametrize("slots", [1, 3, 8, 40])
@pytest.mark.parametrize("n", [256, 300])
def test_combine_adds_in_slot_order(backend, rng, slots, n):
    h, x, weights = normal(rng, 2, n), normal(rng, 2, slots, n), normal(rng, 2, slots)
    buffer = backend.upload(h)
    ops.combine(backend, buffer, backend.upload(x), backend.upload(weights))
    exact = h + np.einsum("ts,tsn->tn", weights.astype(np.float64), x)
    np.testing.assert_allclose(backend.download(buffer), exact, atol=1e-5)


def test_combine_cancels_as_ordered_sums_do(backend):
    """1e30 + 1 − 1e30 is 0 in order and 1 in another: the order is the slots'."""
    x = np.array([[[1e30], [1.0], [-1e30]], [[1e30], [-1e30], [1.0]]], np.float32)
    buffer = backend.upload(np.zeros((2, 1), np.float32))
    ops.combine(backend, buffer, backend.upload(x), backend.upload(np.ones((2, 3), np.float32)))
    assert backend.download(buffer)[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("n", [1, 255, 1000])
def test_add(backend, rng, n):
    h, x = normal(rng, 2, n), normal(rng, 2, n)
    buffer = backend.upload(h)
    ops.add(backend, buffer, backend.upload(x))
    assert np.array_equal(backend.download(buffer), h + x)


def route(backend, logits, bias, slots):
    ids, weights = ops.router_top_k(backend, backend.upload(logits), backend.upload(bias), slots)
    return backend.download(ids), backend.download(weights)


@pytest.mark.parametrize(
    ("experts", "slots"), [(1, 1), (8, 2), (31, 31), (32, 8), (100, 40), (256, 8), (5000, 3)]
)
def test_routing_takes_the_largest_biased_scores(backend, rng, experts, slots):
    logits, bias = normal(rng, 4, experts), normal(rng, experts) * np.float32(0.3)
    ids, weights = route(backend, logits, bias, slots)
    score = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = np.argsort(-(score + bias), axis=1, kind="stable")[:, :slots]
    assert np.array_equal(ids, expected)
    chosen = np.take_along_axis(score, expected, axis=1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-6)


def test_ties_go_to_the_lower_index(backend):
    logits = np.zeros((1, 70), np.float32)
    ids, weights = route(backend, logits, np.zeros(70, np.float32), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    np.testing.assert_allclose(weights, 0.2)
    logits[0, [69, 40, 3]] = 1
    assert route(backend, logits, np.zeros(70, np.float32), 5)[0].tolist() == [[3, 40, 69, 0, 1]]


def test_the_bias_chooses_but_does_not_weigh(backend):
    logits = np.array([[0.0, 2.0, -1.0]], np.float32)
    ids, weights = route(backend, logits, np.array([0, -9, 9], np.float32), 2)
    assert ids.tolist() == [[2, 0]]
    score = 1 / (1 + np.exp(-np.array([-1.0, 0.0])))
    np.testing.assert_allclose(weights[0], score / score.sum(), rtol=1e-6)


def test_scores_that_are_no_numbers_are_never_chosen(backend):
    logits = np.array([[np.nan, 0.5, np.nan], [1.0, np.nan, 2.0]], np.float32)
    ids, weights = route(backend, logits, np.zeros(3, np.float32), 2)
    assert ids.tolist() == [[1, -1], [2, 0]]
    assert np.isnan(weights[0]).all()
    assert np.isfinite(weights[1]).all()


def test_more_slots_than_experts_are_refused(backend):
    logits, bias = backend.upload(np.zeros((1, 3), np.float32)), backend.upload(np.zeros(3, np.float32))
    with pytest.raises(BackendError, match="4 experts cannot be chosen of 3"):
        ops.router_top_k(backend, logits, bias, 4)
