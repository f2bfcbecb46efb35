"""Attention and its cache against f64 numpy: any context length, any grouping of heads, causal."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.forward import ops


def reference(q, keys, values, positions, head_dim):
    tokens, kv_heads = len(q), keys.shape[1] // head_dim
    heads = q.shape[1] // head_dim
    out = np.empty((tokens, heads, head_dim))
    for t in range(tokens):
        for h in range(heads):
            at = slice(h // (heads // kv_heads) * head_dim, (h // (heads // kv_heads) + 1) * head_dim)
            k = keys[: positions[t] + 1, at].astype(np.float64)
            score = k @ q[t, h * head_dim : (h + 1) * head_dim] / np.sqrt(head_dim)
            p = np.exp(score - score.max())
            out[t, h] = p / p.sum() @ values[: positions[t] + 1, at]
    return out.reshape(tokens, -1)


def run(backend, q, keys, values, positions, head_dim):
    buffers = [backend.upload(a) for a in (q, keys, values, positions)]
    return backend.download(ops.attention(backend, *buffers, head_dim))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(6, 1, 128), (4, 2, 128), (2, 2, 64), (3, 3, 256), (4, 1, 40)]
)
def test_attention(backend, rng, heads, kv_heads, head_dim):
    positions = np.array([0, 126, 127, 128, 300], np.int32)
    q = rng.standard_normal((5, heads * head_dim)).astype(np.float32)
    keys, values = rng.standard_normal((2, 301, kv_heads * head_dim)).astype(np.float32)
    got = run(backend, q, keys, values, positions, head_dim)
    np.testing.assert_allclose(got, reference(q, keys, values, positions, head_dim), atol=3e-6)


def test_rows_behind_a_token_are_not_seen(backend, rng):
    q = rng.standard_normal((1, 128)).astype(np.float32)
    keys, values = rng.standard_normal((2, 40, 128)).astype(np.float32)
    before = run(backend, q, keys, values, np.array([20], np.int32), 128)
    keys[21:] = np.nan
    values[21:] = np.nan
    assert np.array_equal(run(backend, q, keys, values, np.array([20], np.int32), 128), before)


def test_scores_far_apart_neither_overflow_nor_vanish(backend):
    """The largest score comes last, after chunks whose weights must shrink to nothing."""
    keys = np.zeros((400, 64), np.float32)
    keys[:, 0] = np.arange(400) * 5
    values = np.tile(np.arange(400, dtype=np.float32)[:, None], (1, 64))
    q = np.zeros((2, 64), np.float32)
    q[0, 0], q[1, 0] = 8, -8
    got = run(backend, q, keys, values, np.array([399, 399], np.int32), 64)
    np.testing.assert_allclose(got, reference(q, keys, values, [399, 399], 64), rtol=1e-5)


def test_kv_append_writes_the_rows_of_the_positions_only(backend, rng):
    k, v = rng.standard_normal((2, 2, 300)).astype(np.float32)
    caches = [backend.upload(np.zeros((6, 300), np.float32)) for _ in range(2)]
    positions = backend.upload(np.array([4, 1], np.int32))
    ops.kv_append(backend, *caches, backend.upload(k), backend.upload(v), positions)
    for cache, new in zip(caches, (k, v), strict=True):
        expected = np.zeros((6, 300), np.float32)
        expected[[4, 1]] = new
        assert np.array_equal(backend.download(cache), expected)


@pytest.mark.parametrize(
    ("width", "kv_width", "head_dim"), [(384, 256, 128), (300, 100, 128), (512, 512, 512), (60, 30, 30)]
)
def test_heads_that_do_not_fit_are_refused(backend, width, kv_width, head_dim):
    cache = backend.upload(np.zeros((4, kv_width), np.float32))
    positions = backend.upload(np.zeros(1, np.int32))
    with pytest.raises(BackendError, match="attention does not fit"):
        q = backend.upload(np.zeros((1, width), np.float32))
        ops.attention(backend, q, cache, cache, positions, head_dim)
