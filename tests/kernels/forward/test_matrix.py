"""The kernels that read quantised matrices, against numpy's decode: bits for decoding, f64 products for the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.forward import ops

GOLDEN = Path(__file__).parents[2] / "golden" / "encode_vectors.npz"
FORMATS = tuple(BY_NAME)
EXPERT_FORMATS = ("F32", "MQ4", "MQ6", "MQ2-Lloyd", "MQ3-Lloyd", "Q8F16")
GOLDEN_FORMATS = {
    "q8f16": "Q8F16",
    "mq4": "MQ4",
    "mq6": "MQ6",
    "mq2l": "MQ2-Lloyd",
    "mq3l": "MQ3-Lloyd",
    "mq4l": "MQ4-Lloyd",
}


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def values(fmt, payload, *shape):
    return BY_NAME[fmt].decode(payload).reshape(shape).astype(np.float64)


def close(got, exact, scale):
    """Within f32 rounding of a sum whose terms add up to `scale` in absolute value."""
    return np.all(np.abs(got - exact) <= 2e-6 * scale + 1e-37)


@pytest.mark.parametrize("case", ["random", "zero", "constant", "subnormal"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("groups", [1, 3, 12, 37])
def test_decode_equals_numpy_bit_for_bit(backend, payload, rng, fmt, groups, case):
    data = payload(fmt, 256 * groups, rng, case)
    got = backend.download(ops.decode(backend, backend.upload(data), fmt, 256 * groups))
    assert same_bits(got, BY_NAME[fmt].decode(data).reshape(-1))


@pytest.mark.parametrize("fmt", ["F16", "F32"])
@pytest.mark.parametrize("n", [1, 7, 250, 257, 1030])
def test_decode_of_single_values_may_end_anywhere(backend, payload, rng, fmt, n):
    data = payload(fmt, n, rng)
    got = backend.download(ops.decode(backend, backend.upload(data), fmt, n))
    assert same_bits(got, BY_NAME[fmt].decode(data).reshape(-1))


@pytest.mark.parametrize("n", [32, 96, 288])
def test_decode_of_q8_ends_at_any_block(backend, payload, rng, n):
    data = payload("Q8F16", n, rng)
    got = backend.download(ops.decode(backend, backend.upload(data), "Q8F16", n))
    assert same_bits(got, BY_NAME["Q8F16"].decode(data).reshape(-1))


@pytest.mark.parametrize("key", GOLDEN_FORMATS)
def test_decode_of_the_golden_blocks(backend, key):
    fmt = GOLDEN_FORMATS[key]
    with np.load(GOLDEN) as vectors:
        data = np.ascontiguousarray(vectors[key]).reshape(-1).view(np.uint8)
    got = backend.download(ops.decode(backend, backend.upload(data), fmt, 256 * 60))
    assert same_bits(got, BY_NAME[fmt].decode(data).reshape(-1))
    assert np.isfinite(got).all()


def test_a_payload_of_another_size_is_refused(backend):
    with pytest.raises(BackendError, match="136 bytes, the payload 135"):
        ops.decode(backend, backend.upload(np.zeros(135, np.uint8)), "MQ4", 256)


@pytest.mark.parametrize("fmt", FORMATS)
def test_embed_reads_rows_and_marks_ids_out_of_range(backend, payload, rng, fmt):
    data = payload(fmt, 9 * 768, rng)
    table = ops.matrix(backend, data, fmt, 9, 768)
    ids = np.array([8, 0, 8, -1, 9, 3], np.int32)
    got = backend.download(ops.embed(backend, table, backend.upload(ids)))
    rows = BY_NAME[fmt].decode(data).reshape(9, 768)
    assert same_bits(got[[0, 1, 2, 5]], rows[[8, 0, 8, 3]])
    assert np.isnan(got[[3, 4]]).all()


@pytest.mark.parametrize("case", ["random", "zero", "constant", "subnormal"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (19, 768), (5, 3072), (3, 256 * 33)])
def test_matvec(backend, payload, rng, fmt, rows, cols, case):
    data = payload(fmt, rows * cols, rng, case)
    x = rng.standard_normal((2, cols)).astype(np.float32)
    got = backend.download(ops.matvec(backend, ops.matrix(backend, data, fmt, rows, cols), backend.upload(x)))
    w = values(fmt, data, rows, cols)
    assert close(got, x @ w.T, np.abs(x) @ np.abs(w).T)
    if case == "zero":
        assert not got.any()


def expert_case(backend, payload, rng, fmt, count, rows, cols):
    """`count` matrices in one buffer, in reverse order, every third not loaded: (Experts, f64 values, loaded)."""
    size = BY_NAME[fmt].nbytes(rows * cols)
    payloads = [payload(fmt, rows * cols, rng) for _ in range(count)]
    offsets = np.array([(count - 1 - e) * size for e in range(count)], np.int64)
    loaded = np.arange(count) % 3 != 2
    data = backend.upload(np.concatenate(payloads[::-1]))
    made = ops.experts(backend, data, np.where(loaded, offsets, -1), fmt, rows, cols)
    return made, np.stack([values(fmt, p, rows, cols) for p in payloads]), loaded


@pytest.mark.parametrize("fmt", EXPERT_FORMATS)
@pytest.mark.parametrize(
    ("rows", "cols", "count", "slots"),
    [(7, 256, 3, 1), (37, 768, 11, 4), (18, 3072, 5, 5), (230, 1536, 3, 2)],
)
def test_experts_are_found_through_the_routed_ids(backend, payload, rng, fmt, rows, cols, count, slots):
    w1, v1, loaded = expert_case(backend, payload, rng, fmt, count, rows, cols)
    w3, v3, _ = expert_case(backend, payload, rng, fmt, count, rows, cols)
    tokens = 3
    ids = rng.integers(0, count, (tokens, slots)).astype(np.int32)
    ids[0, 0] = 2
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    gate, up = ops.expert_gate_up(backend, w1, w3, backend.upload(ids), backend.upload(x))
    there = loaded[ids]
    for got, v in ((backend.download(gate), v1), (backend.download(up), v3)):
        exact = np.einsum("tsrc,tc->tsr", v[ids], x)
        scale = np.einsum("tsrc,tc->tsr", np.abs(v[ids]), np.abs(x))
        assert close(got[there], exact[there], scale[there])
        assert np.isnan(got[~there]).all()
    xs = rng.standard_normal((tokens, slots, cols)).astype(np.float32)
    got = backend.download(ops.expert_down(backend, w1, backend.upload(ids), backend.upload(xs)))
    exact = np.einsum("tsrc,tsc->tsr", v1[ids], xs)
    scale = np.einsum("tsrc,tsc->tsr", np.abs(v1[ids]), np.abs(xs))
    assert close(got[there], exact[there], scale[there])
    assert np.isnan(got[~there]).all()


def test_an_expert_id_out_of_range_gives_nan_and_reads_nothing(backend, payload, rng):
    w, _, _ = expert_case(backend, payload, rng, "MQ4", 2, 5, 256)
    ids = backend.upload(np.array([[-1, 2, 2**31 - 1]], np.int32))
    got = backend.download(ops.expert_down(backend, w, ids, backend.upload(np.ones((1, 3, 256), np.float32))))
    assert np.isnan(got).all()


@pytest.mark.parametrize(
    ("offsets", "why"), [([0, 4], "misaligned"), ([0, 8 * 136], "past the end"), ([-2, 0], "negative")]
)
def test_expert_offsets_that_do_not_fit_are_refused(backend, offsets, why):
    data = backend.upload(np.zeros(8 * 136, np.uint8))
    with pytest.raises(BackendError, match="expert offsets do not fit MQ4"):
        ops.experts(backend, data, offsets, "MQ4", 4, 256)


def test_gate_and_up_of_two_formats_are_refused(backend, payload, rng):
    w1, _, _ = expert_case(backend, payload, rng, "MQ4", 2, 5, 256)
    w3, _, _ = expert_case(backend, payload, rng, "MQ6", 2, 5, 256)
    ids = backend.upload(np.zeros((1, 1), np.int32))
    with pytest.raises(BackendError, match="one format and one shape"):
        ops.expert_gate_up(backend, w1, w3, ids, backend.upload(np.zeros((1, 256), np.float32)))


def test_all_products_of_experts_are_those_of_the_launches_one_by_one(backend, payload, rng):
    (w1, _, _), (w3, _, _) = (expert_case(backend, payload, rng, "MQ3-Lloyd", 2, 512, 256) for _ in range(2))
    w2, _, _ = expert_case(backend, payload, rng, "MQ4", 2, 256, 512)
    ids, signs = backend.upload(np.array([[0, 1], [1, 1]], np.int32)), ops.signs(backend)
    x = backend.upload(rng.standard_normal((2, 256)).astype(np.float32))
    r = ops.silu_mul_rotate(backend, *ops.expert_gate_up(backend, w1, w3, ids, x), signs)
    one = backend.download(ops.expert_mlp(backend, (w1, w3, w2), ids, x, signs))
    assert one.tobytes() == backend.download(ops.expert_down(backend, w2, ids, r)).tobytes()
    with pytest.raises(BackendError, match="gate has shape"):
        ops.expert_mlp(backend, (w1, w3, w1), ids, x, signs)


@pytest.mark.parametrize("cols", [0, 128, 300])
def test_rows_that_are_not_whole_groups_are_refused(backend, cols):
    with pytest.raises(BackendError, match="does not divide into groups of 256"):
        ops.matrix(backend, np.zeros(1, np.uint8), "MQ4", 1, cols)
