"""Rows that answer each other lose less where errors cost more, and change nothing where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.awq.row_answers import (
    BLOCKS,
    DAMPING,
    RowAnswers,
    Sensitivity,
    cost_factor,
    row_answers,
)

ROWS, WIDTH, MANY = 96, 64, 10**9
RANDOM = np.random.default_rng(5)
MATRIX = RANDOM.standard_normal((ROWS, WIDTH)).astype(np.float32)


def moment(tokens: int = 4 * ROWS, rows: int = ROWS, seed: int = 2) -> np.ndarray:
    """E[g gᵀ] of so many gradients of length 1, most of which lie in a few directions."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((rows, rows)) * np.arange(1, rows + 1) ** -0.8
    g = random.standard_normal((tokens, rows)) @ mix.T
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    found: np.ndarray = g.T @ g / tokens
    return found


def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes u8 and values of a plain grid."""
    codes = np.clip(np.rint(rows / 0.5), -6, 6)
    return (codes + 6).astype(np.uint8), (0.5 * codes).astype(np.float32)


def payload_of(answers: RowAnswers | None) -> np.ndarray:
    """Block by block, each toward a target that answers what those before it missed."""
    payloads, missed = [], np.zeros_like(MATRIX)
    for rows, share in answers or [(slice(0, ROWS), np.zeros((ROWS, 0), np.float32))]:
        payload, values = rounded(MATRIX[rows] + share @ missed[: rows.start])
        missed[rows] = MATRIX[rows] - values
        payloads.append(payload)
    return np.concatenate(payloads)


def values_of(payload: np.ndarray) -> np.ndarray:
    return 0.5 * (payload.reshape(MATRIX.shape).astype(np.float64) - 6)


def cost(payload: np.ndarray, g: np.ndarray, h: np.ndarray) -> float:
    """tr(G E H Eᵀ)."""
    errors = MATRIX - values_of(payload)
    return float(np.trace(g @ errors @ h @ errors.T))


@pytest.mark.parametrize("alike", [False, True])
def test_errors_cost_less_than_those_of_rows_rounded_alone(alike: bool) -> None:
    g = moment()
    x = RANDOM.standard_normal((1000, WIDTH)) * (1 if alike else np.geomspace(1, 0.1, WIDTH))
    h = x.T @ x / len(x)
    answers = row_answers(cost_factor(Sensitivity(g, MANY)))
    answering = payload_of(answers)
    assert cost(answering, g, h) < 0.7 * cost(rounded(MATRIX)[0], g, h)
    assert cost(answering, np.eye(ROWS), h) > cost(rounded(MATRIX)[0], np.eye(ROWS), h), "others pay for it"


def test_each_block_is_shifted_to_where_all_that_follows_can_make_the_most_good() -> None:
    """Against the Schur complement: what errors of the first rows cost once the others answer as well as they can."""
    g = moment()
    answers = row_answers(cost_factor(Sensitivity(g, MANY)))
    assert answers is not None and len(answers) == BLOCKS
    damped = (1 - DAMPING) * g / (np.trace(g) / ROWS) + DAMPING * np.eye(ROWS)
    free = np.linalg.inv(damped)
    for rows, share in answers:
        least = np.linalg.inv(free[: rows.stop, : rows.stop])
        want = np.linalg.solve(least[rows, rows], least[rows, : rows.start])
        np.testing.assert_allclose(share, want, atol=1e-4 * max(np.abs(want).max(initial=0), 1))


@pytest.mark.parametrize("tokens", [1, 1000, MANY])
def test_where_all_directions_cost_the_same_nothing_changes(tokens: int) -> None:
    answers = row_answers(cost_factor(Sensitivity(np.eye(ROWS) / ROWS, tokens)))
    assert answers is not None and not any(share.any() for _, share in answers)
    assert np.array_equal(payload_of(answers), rounded(MATRIX)[0])


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8)),
        -np.eye(8),
        np.diag([np.nan, *np.ones(7)]),
        np.diag([np.inf, -np.inf, *np.ones(6)]),
        np.eye(8) + np.where(np.eye(8)[::-1], np.nan, 0),
        np.diag([10.0, *-np.ones(7)]),
    ],
    ids=["zero", "negative", "nan", "infinities", "nan beside the diagonal", "indefinite"],
)
def test_where_nothing_is_known_rows_are_rounded_alone(wrong: np.ndarray) -> None:
    assert row_answers(cost_factor(Sensitivity(wrong, MANY))) is None


def test_the_fewer_tokens_the_less_is_answered() -> None:
    g = moment()

    def answered(tokens: int) -> float:
        answers = row_answers(cost_factor(Sensitivity(g, tokens)))
        assert answers is not None
        return sum(float(np.square(share).sum()) for _, share in answers)

    of = [answered(tokens) for tokens in (2, 20, 200, 2000, 20000, MANY)]
    assert of == sorted(of) and of[0] < 0.1 * of[2] < 0.1 * of[-1]


def test_few_tokens_do_not_cost_more_than_none() -> None:
    """What is known of two hundred tokens, judged by what many say."""
    g = moment(50_000)
    few = row_answers(cost_factor(Sensitivity(moment(200), 200)))
    plain = cost(rounded(MATRIX)[0], g, np.eye(WIDTH))
    assert cost(payload_of(few), g, np.eye(WIDTH)) < plain


@given(st.integers(1, 150), st.integers(1, 40), st.integers(0, 9))
def test_blocks_have_every_row_once_whatever_the_width(rows: int, tokens: int, seed: int) -> None:
    answers = row_answers(cost_factor(Sensitivity(moment(tokens, rows, seed), tokens)))
    assert answers is not None and len(answers) <= BLOCKS
    at = 0
    for block, share in answers:
        assert block.start == at < block.stop and block.step is None
        assert share.shape == (block.stop - block.start, at) and np.isfinite(share).all()
        assert share.dtype == np.float32
        at = block.stop
    assert at == rows
