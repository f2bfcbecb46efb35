"""Blocks of rows that answer each other: targets by their definition, bytes of rows alone where nothing is answered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lanes_problem import heavy_rows
from mq_quant.formats.blocks import MQ2_LLOYD, MQ3_LLOYD, MQ4
from mq_quant.lloyd.encode import encode_rotated
from mq_quant.lloyd.hessian.row import from_weights
from mq_quant.lloyd.row_blocks import RowAnswers, answer_rows, encode_blocks, strips

FORMATS = [pytest.param(fmt, id=fmt.name) for fmt in (MQ2_LLOYD, MQ3_LLOYD, MQ4)]
WIDTH = 512
HESSIAN = from_weights(np.linspace(1, 4, WIDTH))


def answers_of(sizes: list[int], seed: int = 0) -> RowAnswers:
    random, stops = np.random.default_rng(seed), np.cumsum(sizes).tolist()
    return [
        (slice(stop - size, stop), random.normal(0, 0.1, (size, stop - size)).astype(np.float32))
        for size, stop in zip(sizes, stops, strict=True)
    ]


@given(st.integers(1, 21), st.integers(0, 600), st.integers(1, 3), st.integers(0, 9))
def test_a_target_is_a_row_and_its_share_of_errors_before_it(
    count: int, before: int, wide: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rows, share, errors = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((count, 16 * wide), (count, before), (before + 3, 16 * wide))
    )
    targets = np.empty_like(rows)
    answer_rows(rows, share, np.ascontiguousarray(strips(errors)), targets)
    want = rows + share.astype(np.float64) @ errors[:before]
    np.testing.assert_allclose(targets, want, atol=1e-5 * (1 + np.abs(share).sum(1).max()))


def test_sums_are_taken_in_the_order_of_the_errors() -> None:
    """1 and then 1e8 are 1e8 in f32, of which nothing is left when that goes; the other way round 1 stays."""
    rows, errors = np.zeros((2, 16), np.float32), np.ones((3, 16), np.float32)
    share = np.array([[1, 1e8, -1e8], [1e8, -1e8, 1]], np.float32)
    targets = np.empty_like(rows)
    answer_rows(rows, share, np.ascontiguousarray(strips(errors)), targets)
    assert targets[0].tolist() == [0.0] * 16 and targets[1].tolist() == [1.0] * 16


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_block_aims_at_what_answers_the_blocks_before_it(fmt) -> None:
    rows, answers = heavy_rows(37, WIDTH), answers_of([16, 5, 16])
    payload = encode_blocks(rows, answers, fmt, "hessian", HESSIAN, 0.5)
    missed = rows - fmt.decode(payload).reshape(rows.shape)
    at = 0
    for block, share in answers:
        target = np.empty_like(rows[block])
        answer_rows(rows[block], share, np.ascontiguousarray(strips(missed)), target)
        want = encode_rotated(target, fmt, "hessian", HESSIAN, 0.5)
        np.testing.assert_array_equal(payload[at : at + len(want)], want)
        at += len(want)
    assert at == len(payload)


@pytest.mark.parametrize("fmt", FORMATS)
def test_where_nothing_is_answered_the_bytes_are_those_of_rows_alone(fmt) -> None:
    rows = heavy_rows(32, WIDTH)
    silent = [(block, np.zeros_like(share)) for block, share in answers_of([16, 16])]
    want = encode_rotated(rows, fmt, "hessian", HESSIAN, 1.0)
    for answers in (silent, [(slice(0, 32), np.zeros((32, 0), np.float32))]):
        np.testing.assert_array_equal(encode_blocks(rows, answers, fmt, "hessian", HESSIAN, 1.0), want)


def test_rows_are_left_as_they_were_given() -> None:
    rows = heavy_rows(32, WIDTH)
    before = rows.copy()
    encode_blocks(rows, answers_of([16, 16]), MQ2_LLOYD, "hessian", HESSIAN, 1.0)
    np.testing.assert_array_equal(rows, before)
