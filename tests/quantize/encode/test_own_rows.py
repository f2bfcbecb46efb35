"""An expert whose inputs were kept: rounded under its own moments, with a down that answers gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import small_model
from mq_quant.awq.from_imatrix import ImatrixLayer
from mq_quant.awq.importance import Importance, LayerImportance, square
from mq_quant.awq.own_moments import mixed, own_moment, whitening
from mq_quant.awq.row_answers import RowAnswers, Sensitivity, cost_factor, row_answers
from mq_quant.formats.blocks import MQ2_LLOYD, MQ3_LLOYD, Format
from mq_quant.formats.errors import WeightError
from mq_quant.formats.minimax import expert_name, parse_config
from mq_quant.lloyd.encode import ENCODED
from mq_quant.quantize.encode import layer_encoder
from mq_quant.quantize.encode.answering import product
from mq_quant.quantize.encode.layer_encoder import OWN_DAMPING, EncodedExpert, LayerEncoder
from mq_quant.quantize.encode.once import Together
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
class White(ImatrixLayer):
    """A layer of one expert that sees white inputs."""

    def of(self, expert: int, projection: str) -> Importance:
        width = SHAPES[projection][1]
        return Importance(np.ones(width), np.eye(width), 1e6)


@dataclass(frozen=True)
class Kept(White):
    """The same, whose expert saw `rows` itself, which were kept; `answers` as `LayerWithRows` says."""

    rows: np.ndarray
    answers: RowAnswers | None = None
    asked: list[tuple[str, int]] = field(default_factory=list)

    def inputs(self, expert: int) -> np.ndarray:
        return self.rows

    def from_rows(
        self, expert: int, projection: str, rows: np.ndarray, sums: Any = None, room: Any = None
    ) -> Importance:
        self.asked.append((projection, len(rows)))
        prior = self.of(expert, projection)
        assert prior.moment is not None
        return mixed(rows, prior, whitening(prior.moment), sums, room)


def white() -> White:
    energies = {p: np.ones((1, shape[1])) for p, shape in SHAPES.items()}
    return White(1, energies, {p: np.ones(1) for p in SHAPES}, ())


def layer(rows: np.ndarray, answers: RowAnswers | None = None) -> Kept:
    return Kept(**vars(white()), rows=rows, answers=answers)


def encode(importance: LayerImportance, **settings: float) -> tuple[LayerEncoder, EncodedExpert]:
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
    assert lost(*encode(layer(inputs(ROWS, 5)))) < 0.6 * lost(*encode(white()))


def test_down_is_rounded_under_what_rounded_gate_and_up_give() -> None:
    given = layer(inputs(ROWS, 5))
    encode(given)
    assert given.asked == [("w1", ROWS), ("w2", ROWS)]


def test_an_expert_that_saw_nothing_is_rounded_under_the_layers_moment() -> None:
    _, nothing = encode(layer(np.empty((0, HIDDEN), np.float32)))
    assert nothing.payloads.keys() == SHAPES.keys()
    few = lost(*encode(layer(inputs(2, 5))))
    assert few < 1.2 * lost(*encode(white()))


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


@dataclass(frozen=True)
class OneWay(Kept):
    """Inputs all point one way, so that the moment has no factor before it is damped further."""

    def from_rows(
        self, expert: int, projection: str, rows: np.ndarray, sums: Any = None, room: Any = None
    ) -> Importance:
        moment = square(SHAPES[projection][1], room)
        moment[:] = 1
        return Importance(np.diag(moment).copy(), moment, 1e6)


def test_a_moment_is_damped_further_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one file it lies in the room in which it is factored, for several in memory of its own."""
    monkeypatch.setattr(layer_encoder, "OWN_DAMPING", dict.fromkeys(OWN_DAMPING, 0.0))
    made, alone = encode(OneWay(**vars(layer(inputs(9, 5)))))
    assert {p: "damped by a further" in note for p, (note,) in alone.notes.items()} == dict.fromkeys(
        SHAPES, True
    )
    together = made.encode_expert(0, **WEIGHTS, once=Together())
    assert together.notes == alone.notes
    assert all(np.array_equal(alone.payloads[p], together.payloads[p]) for p in SHAPES)


def gradients() -> np.ndarray:
    """E[g gᵀ] of gradients behind the layer, most of which lie in a few directions."""
    g = inputs(4000, 31)
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    found: np.ndarray = (g.T.astype(np.float64) @ g) / len(g)
    return found


def answering(g: np.ndarray | None) -> Kept:
    """The same layer, where it is known what errors behind it cost."""
    return layer(inputs(ROWS, 5), None if g is None else row_answers(cost_factor(Sensitivity(g, 10**6))))


def cost(made: LayerEncoder, done: EncodedExpert, g: np.ndarray) -> float:
    """Mean of eᵀ G e over the outputs of 1000 tokens that were not kept."""
    forms = {p: made.stored.form(p) for p in SHAPES}
    decoded = {p: forms[p].decode(done.payloads[p], SHAPES[p]) for p in SHAPES}
    x = inputs(1000, 99)
    error = product(x, decoded["w1"], decoded["w3"]) @ decoded["w2"].T
    error -= product(x, WEIGHTS["w1"], WEIGHTS["w3"]) @ WEIGHTS["w2"].T
    return float(((error @ g) * error).sum(1).mean())


def test_down_whose_rows_answer_each_other_costs_less() -> None:
    g = gradients()
    alone, together = (encode(answering(each)) for each in (None, g))
    for p in ("w1", "w3"):
        assert np.array_equal(alone[1].payloads[p], together[1].payloads[p])
    assert together[1].payloads["w2"].shape == alone[1].payloads["w2"].shape
    assert cost(*together, g) < 0.8 * cost(*alone, g)


def test_without_a_direction_that_costs_more_every_byte_is_the_same() -> None:
    even = encode(answering(np.eye(HIDDEN) / HIDDEN))[1]
    for other in (layer(inputs(ROWS, 5)), answering(None), answering(np.zeros((HIDDEN, HIDDEN)))):
        found = encode(other)[1]
        assert all(np.array_equal(even.payloads[p], found.payloads[p]) for p in SHAPES)


def test_rows_that_answer_each_other_have_the_same_bytes_on_any_number_of_threads() -> None:
    made, done = encode(answering(gradients()))
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda _: made.encode_expert(0, **WEIGHTS), range(3)))
    assert all(np.array_equal(done.payloads["w2"], other.payloads["w2"]) for other in again)


@pytest.mark.parametrize("large", [1e7, 1e30])
def test_a_down_that_no_level_holds_is_refused_by_name(large: float) -> None:
    """However large what its first rows miss is for those that answer them."""
    w2 = WEIGHTS["w2"].copy()
    w2[3] *= np.float32(large)
    made, _ = encode(answering(gradients()))
    with pytest.raises(WeightError, match="level") as refused:
        made.encode_expert(0, WEIGHTS["w1"], WEIGHTS["w3"], w2)
    assert refused.value.tensor == expert_name(1, 0, "w2")


def test_down_alone_answers_too() -> None:
    """As a measurement rounds it."""
    seen = product(inputs(ROWS, 5), WEIGHTS["w1"], WEIGHTS["w3"])
    payloads = [encode(answering(g))[0].encode_down(0, WEIGHTS["w2"], seen) for g in (None, gradients())]
    assert payloads[0].shape == payloads[1].shape and not np.array_equal(*payloads)
