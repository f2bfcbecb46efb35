"""w2 that answers what rounded gate and up give: nearer outputs on unseen tokens, and w2 itself without any."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.awq.own_moments import summed
from mq_quant.quantize.encode.answering import answering_down, product, silu

HIDDEN, WIDTH = 40, 24


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def weights(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w1, w3 = (rng.standard_normal((WIDTH, HIDDEN)).astype(np.float32) / 4 for _ in range(2))
    return w1, w3, rng.standard_normal((HIDDEN, WIDTH)).astype(np.float32)


def rough(w: np.ndarray) -> np.ndarray:
    """Three levels: about what 2 bits do."""
    return (0.3 * np.rint(w / 0.3)).astype(np.float32)


def products(inputs: np.ndarray, w1: np.ndarray, w3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What w2 sees of exact and of rough gate and up, f32 [n, 24] each."""
    return product(inputs, w1, w3), product(inputs, rough(w1), rough(w3))


def test_outputs_on_other_tokens_come_nearer(rng: np.random.Generator) -> None:
    w1, w3, w2 = weights(rng)
    seen, other = (rng.standard_normal((count, HIDDEN)).astype(np.float32) for count in (20000, 2000))
    fitted = answering_down(w2, *products(seen, w1, w3))
    want = product(other, w1, w3) @ w2.T
    given = product(other, rough(w1), rough(w3))
    assert np.square(given @ fitted.T - want).sum() < 0.9 * np.square(given @ w2.T - want).sum()


def test_nothing_changes_where_gate_and_up_are_exact(rng: np.random.Generator) -> None:
    w1, w3, w2 = weights(rng)
    inputs = rng.standard_normal((3000, HIDDEN)).astype(np.float32)
    there = product(inputs, w1, w3)
    np.testing.assert_allclose(answering_down(w2, there, there), w2, atol=1e-4)


def test_rows_that_are_not_finite_are_left_out(rng: np.random.Generator) -> None:
    w1, w3, w2 = weights(rng)
    there, here = products(rng.standard_normal((3000, HIDDEN)).astype(np.float32), w1, w3)
    there[5, 3], here[900, 0] = np.inf, np.nan
    good = np.setdiff1d(np.arange(3000), [5, 900])
    np.testing.assert_allclose(
        answering_down(w2, there, here), answering_down(w2, there[good], here[good]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "a row not finite"])
@pytest.mark.parametrize("count", [3000, 5000])
def test_known_sums_give_the_same_bits(count: int, bad: bool, rng: np.random.Generator) -> None:
    w1, w3, w2 = weights(rng)
    there, here = products(rng.standard_normal((count, HIDDEN)).astype(np.float32), w1, w3)
    if bad:
        here[count - 1, 2] = np.nan
    want = answering_down(w2, there, here)
    assert np.isfinite(want).all()
    np.testing.assert_array_equal(answering_down(w2, there, here, summed(here)), want)


@pytest.mark.parametrize("size", [1e-17, 1e17])
def test_the_size_of_inputs_does_not_matter(size: float, rng: np.random.Generator) -> None:
    w1, w3, w2 = weights(rng)
    there, here = products(rng.standard_normal((500, HIDDEN)).astype(np.float32), w1, w3)
    want = answering_down(w2, there, here)
    scaled = (answered * np.float32(size) for answered in (there, here))
    np.testing.assert_allclose(answering_down(w2, *scaled), want, atol=1e-5)


def test_few_tokens_move_little(rng: np.random.Generator) -> None:
    w1, w3, w2 = weights(rng)
    inputs = rng.standard_normal((4000, HIDDEN)).astype(np.float32)

    def moved(count: int) -> float:
        fitted = answering_down(w2, *products(inputs[:count], w1, w3))
        return float(np.square(fitted - w2).sum())

    assert moved(4) < 0.2 * moved(4000)


@pytest.mark.parametrize("bad", ["nothing seen", "not finite", "silent"])
def test_w2_stays_where_its_tokens_say_nothing(bad: str, rng: np.random.Generator) -> None:
    w1, w3, w2 = weights(rng)
    inputs = {
        "nothing seen": np.empty((0, HIDDEN), np.float32),
        "not finite": np.full((3, HIDDEN), np.nan, np.float32),
        "silent": np.zeros((3, HIDDEN), np.float32),
    }[bad]
    there = product(inputs, w1, w3)
    assert answering_down(w2, there, there) is w2


def test_silu_is_exact_far_from_zero() -> None:
    x = np.array([-1e4, -100, -20, 0, 20, 1e4], np.float32)
    np.testing.assert_allclose(
        silu(x), x / (1 + np.exp(-x.astype(np.float64).clip(-700))), rtol=1e-6, atol=1e-30
    )
