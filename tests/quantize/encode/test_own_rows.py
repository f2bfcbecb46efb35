"""An expert whose inputs were kept: rounded under its own moments, with a down that answers gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import small_model
from mq_quant.awq.from_imatrix import ImatrixLayer
from mq_quant.awq.importance import Importance
from mq_quant.awq.own_moments import mixed, own_moment, whitening
from mq_quant.formats.blocks import MQ2_LLOYD, MQ3_LLOYD, Format
from mq_quant.formats.minimax import parse_config
from mq_quant.lloyd.encode import ENCODED
from mq_quant.quantize.encode.answering import product
from mq_quant.quantize.encode.layer_encoder import OWN_DAMPING, EncodedExpert, LayerEncoder
from mq_quant.quantize.encode.prepared_layer import FitSettings

HIDDEN, INTER, ROWS = 512, 256, 3000
CONFIG = parse_config(small_model.CONFIG | {"hidden_size": HIDDEN, "intermediate_size": INTER})
FORMATS: dict[str, Format] = {"w1": MQ2_LLOYD, "w3": MQ2_LLOYD, "w2": MQ3_LLOYD}
SHAPES = {"w1": (INTER, HIDDEN), "w3": (INTER, HIDDEN), "w2": (HIDDEN, INTER)}
RANDOM = np.random.default_rng(7)
WEIGHTS = {p: (RANDOM.standard_normal(shape) / 16).astype(np.float32) for p, shape in SHAPES.items()}
Arrays = Mapping[str, np.ndarray]


def inputs(count: int, seed: int) -> np.ndarray:
    """Rows f32 [count, 512] with an expert's own correlations: a few directions carry most."""
    mix = np.random.default_rng(1).standard_normal((HIDDEN, HIDDEN)) * np.arange(1, HIDDEN + 1) ** -0.7
    return (np.random.default_rng(seed).standard_normal((count, HIDDEN)) @ mix.T).astype(np.float32)


@dataclass(frozen=True)
class Kept(ImatrixLayer):
    """One expert whose layer sees white inputs, and itself `rows`, which were kept or not."""

    rows: np.ndarray | None = None
    asked: list[tuple[str, int]] = field(default_factory=list)

    def of(self, expert: int, projection: str) -> Importance:
        width = SHAPES[projection][1]
        return Importance(np.ones(width), np.eye(width), 1e6)

    def inputs(self, expert: int) -> np.ndarray | None:  # type: ignore[override]
        return self.rows

    def from_rows(self, expert: int, projection: str, rows: np.ndarray) -> Importance:
        self.asked.append((projection, len(rows)))
        prior = self.of(expert, projection)
        assert prior.moment is not None
        return mixed(rows, prior, whitening(prior.moment))


def layer(rows: np.ndarray | None) -> Kept:
    energies = {p: np.ones((1, shape[1])) for p, shape in SHAPES.items()}
    return Kept(1, energies, {p: np.ones(1) for p in SHAPES}, (), rows)


def encode(importance: Kept, **settings: float) -> tuple[LayerEncoder, EncodedExpert]:
    made = LayerEncoder(CONFIG, 1, importance, FORMATS, FitSettings(**({"awq_alpha": 0.5} | settings)))  # type: ignore[arg-type]
    made.prepare({})
    return made, made.encode_expert(0, **WEIGHTS)


def lost(made: LayerEncoder, done: EncodedExpert, fold: np.ndarray | None = None) -> float:
    """Share of the output's energy that is lost on 1000 tokens that were not kept."""
    forms = {p: made.stored.form(p, fold) for p in SHAPES}
    decoded = {p: forms[p].decode(done.payloads[p], SHAPES[p]) for p in SHAPES}
    x = inputs(1000, 99)
    want = product(x, WEIGHTS["w1"], WEIGHTS["w3"]) @ WEIGHTS["w2"].T
    given = product(x, decoded["w1"], decoded["w3"]) @ decoded["w2"].T
    return float(np.square(given - want).sum() / np.square(want).sum())


def test_outputs_on_other_tokens_come_much_nearer_than_under_the_layers_moment() -> None:
    assert lost(*encode(layer(inputs(ROWS, 5)))) < 0.6 * lost(*encode(layer(None)))


def test_down_is_rounded_under_what_rounded_gate_and_up_give() -> None:
    given = layer(inputs(ROWS, 5))
    encode(given)
    assert given.asked == [("w1", ROWS), ("w2", ROWS)]


def test_an_expert_that_saw_nothing_is_rounded_under_the_layers_moment() -> None:
    _, nothing = encode(layer(np.empty((0, HIDDEN), np.float32)))
    assert nothing.payloads.keys() == SHAPES.keys()
    few = lost(*encode(layer(inputs(2, 5))))
    assert few < 1.2 * lost(*encode(layer(None)))


def test_a_fold_changes_nothing_but_rounding() -> None:
    made, done = encode(layer(inputs(ROWS, 5)), fold_down=0.5)
    fold = made.fold(made.importance.of(0, "w2"))  # type: ignore[union-attr]
    assert lost(made, done, fold) == pytest.approx(lost(*encode(layer(inputs(ROWS, 5)))), rel=0.2)


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    made, done = encode(layer(inputs(500, 5)))
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda _: made.encode_expert(0, **WEIGHTS), range(3)))
    for other in again:
        assert all(np.array_equal(done.payloads[p], other.payloads[p]) for p in SHAPES)


def test_the_more_levels_the_less_an_own_moment_is_damped() -> None:
    assert set(OWN_DAMPING) == {fmt.levels for fmt in ENCODED}
    falling = [OWN_DAMPING[levels] for levels in sorted(OWN_DAMPING)]
    assert falling == sorted(falling, reverse=True)


def test_with_many_rows_the_mixture_is_their_own_moment() -> None:
    rows = inputs(ROWS, 5)
    shared = Importance(np.ones(HIDDEN), np.eye(HIDDEN), 1e6)
    got = mixed(rows, shared, whitening(np.eye(HIDDEN)))
    assert got.moment is not None
    np.testing.assert_allclose(got.moment, own_moment(rows), rtol=0.1, atol=0.1)
