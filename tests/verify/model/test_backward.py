"""Back through the reference forward pass, against torch's own way back through all of it at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.minimax import layer_inventory
from mq_quant.verify.model import backward
from mq_quant.verify.model.backward import TOGETHER, graph_bytes, head_gradient, layer_backward
from mq_quant.verify.model.reference import (
    before_experts,
    embed,
    layer_by_layer,
    layer_forward,
    load,
    logits,
)
from mq_quant.verify.model.spread_forward import Tensors


def stream(checkpoint: Checkpoint, sequences: int, length: int = 6) -> torch.Tensor:
    """What enters the second layer, f64: the first one's gradients meet no more than the second one's."""
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, (sequences, length))
    with torch.no_grad():
        return layer_forward(checkpoint, checkpoint.config, 0, embed(checkpoint, ids, torch.float64))


def by_autograd(
    checkpoint: Checkpoint, layer: int, hidden: torch.Tensor, given: torch.Tensor
) -> torch.Tensor:
    x = hidden.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(layer_forward(checkpoint, checkpoint.config, layer, x), x, given)
    return found


def random_like(hidden: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_normal(tuple(hidden.shape))).to(hidden)


@pytest.mark.parametrize("sequences", [1, TOGETHER, TOGETHER + 3])
def test_a_layer_is_that_of_autograd(sequences: int, checkpoint: Checkpoint) -> None:
    hidden = stream(checkpoint, sequences)
    given = random_like(hidden)
    want = by_autograd(checkpoint, 1, hidden, given)
    found = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_every_part_of_a_layer_counts(checkpoint: Checkpoint) -> None:
    """The experts, and the router's weights: without either the gradient is another."""
    hidden = stream(checkpoint, 2)
    given = random_like(hidden)
    whole = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    x = hidden.clone().requires_grad_()
    behind, inputs, routing = before_experts(checkpoint, checkpoint.config, 1, x)
    (direct,) = torch.autograd.grad(behind, x, given, retain_graph=True)
    of_inputs, of_shares = backward._experts_backward(
        checkpoint,
        checkpoint.config,
        1,
        inputs.detach(),
        routing.ids,
        routing.weights.detach(),
        given.flatten(0, 1),
    )
    (through_inputs,) = torch.autograd.grad(inputs, x, of_inputs, retain_graph=True)
    (through_router,) = torch.autograd.grad(routing.weights, x, of_shares)
    torch.testing.assert_close(direct + through_inputs + through_router, whole)
    for part in (direct, through_inputs, through_router):
        assert part.abs().max() > 1e-3 * whole.abs().max()


def test_f32_is_near_and_always_the_same(checkpoint: Checkpoint) -> None:
    hidden = stream(checkpoint, TOGETHER + 1)
    given = random_like(hidden)
    want = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    found = [
        layer_backward(checkpoint, checkpoint.config, 1, hidden.float(), given.float()) for _ in range(2)
    ]
    assert torch.equal(*found)
    near = torch.cosine_similarity(found[0].double().flatten(0, 1), want.flatten(0, 1), dim=-1)
    assert near.median() > 0.99999


def test_nothing_is_asked_of_what_is_handed_in(checkpoint: Checkpoint) -> None:
    """Neither gets a gradient nor changes, and what comes out holds no graph."""
    hidden = stream(checkpoint, 2)
    given = random_like(hidden)
    before = hidden.clone(), given.clone()
    found = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    assert torch.equal(hidden, before[0]) and torch.equal(given, before[1])
    assert not (hidden.requires_grad or given.requires_grad or found.requires_grad)


def test_attention_is_held_of_few_sequences_at_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(weights: Checkpoint, cfg: object, layer: int, hidden: torch.Tensor) -> object:
        seen.append(len(hidden))
        return before_experts(weights, cfg, layer, hidden)  # type: ignore[arg-type]

    monkeypatch.setattr(backward, "before_experts", watched)
    hidden = stream(checkpoint, 2 * TOGETHER + 1, 3)
    layer_backward(checkpoint, checkpoint.config, 1, hidden, random_like(hidden))
    assert max(seen) == TOGETHER and sum(seen) == 2 * len(hidden)


@pytest.mark.parametrize("kept", [1, 2, 9])
def test_sequences_that_wait_for_the_experts_are_run_once(
    kept: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the bits of those that are run again, and nothing of them is held afterwards."""
    hidden = stream(checkpoint, 2 * TOGETHER + 1, 3)
    given = random_like(hidden)
    want = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    ran: list[int] = []
    real = before_experts
    monkeypatch.setattr(backward, "before_experts", lambda *of: ran.append(len(of[-1])) or real(*of))
    monkeypatch.setattr(backward, "_graphs", lambda *_: kept)
    found = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    assert torch.equal(found, want) and not found.requires_grad
    assert sum(ran) == len(hidden) + max(len(hidden) - kept * TOGETHER, 0)


@pytest.mark.parametrize(("sequences", "length"), [(1, 40), (5, 7), (8, 100)])
def test_what_sequences_hold_while_they_wait_is_known(
    sequences: int, length: int, checkpoint: Checkpoint
) -> None:
    """All that torch saves for gradients but the weights, which are there once."""
    cfg, held = checkpoint.config, dict[int, int]()
    weights = Tensors({s.name: load(checkpoint, s.name, torch.empty(0)) for s in layer_inventory(cfg, 1)})
    own = {t.untyped_storage().data_ptr() for t in weights.of.values()}

    def note(saved: torch.Tensor) -> torch.Tensor:
        held[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    x = torch.randn(sequences, length, cfg.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        out = before_experts(weights, cfg, 1, x)
    total = sum(nbytes for at, nbytes in held.items() if at not in own)
    assert 0.8 * total < graph_bytes(cfg, sequences, length) < 1.2 * total
    assert out[0].requires_grad


def test_what_later_tokens_cost_reaches_earlier_ones_alone(checkpoint: Checkpoint) -> None:
    hidden = stream(checkpoint, 2)
    given = torch.zeros_like(hidden)
    given[0, 3] = 1
    found = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    reached = found.abs().amax(-1) > 0
    assert reached[0].tolist() == [True] * 4 + [False] * 2 and not reached[1].any()


def test_a_gradient_that_is_not_finite_stays_in_its_sequence(checkpoint: Checkpoint) -> None:
    hidden = stream(checkpoint, TOGETHER + 2)
    given = random_like(hidden)
    good = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    given[1, 2] = torch.nan
    found = layer_backward(checkpoint, checkpoint.config, 1, hidden, given)
    others = [n for n in range(len(hidden)) if n != 1]
    torch.testing.assert_close(found[others], good[others])
    assert found[1, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_behind_the_head_it_is_that_of_the_drawn_tokens_probability(
    dtype: torch.dtype, checkpoint: Checkpoint, tokens: np.ndarray
) -> None:
    cfg = checkpoint.config
    *_, (_, hidden) = layer_by_layer(checkpoint, cfg, tokens, dtype=dtype)
    draws = torch.from_numpy(np.random.default_rng(0).random(tokens.shape, np.float32))
    found = head_gradient(checkpoint, cfg, hidden, draws)
    x = hidden.clone().requires_grad_()
    said = torch.stack(list(logits(checkpoint, cfg, x)))
    p = said.detach().softmax(-1)
    drawn = torch.searchsorted(p.cumsum(-1), draws.to(p)[..., None])
    assert 0 < drawn.min() < drawn.max() < cfg.vocab_size and len(drawn.unique()) > 10
    (want,) = torch.autograd.grad(said.log_softmax(-1).gather(-1, drawn).sum(), x)
    close = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, want, rtol=close, atol=close * float(want.abs().max()))


def test_tokens_are_drawn_as_often_as_the_model_says_them(checkpoint: Checkpoint) -> None:
    """Of gradients of drawn tokens the mean is zero, which those of the likeliest tokens would not have."""
    cfg = checkpoint.config
    hidden = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 1, cfg.hidden_size)))
    count = 4000
    even = torch.arange(count, dtype=torch.float64)[None] / count
    drawn = head_gradient(checkpoint, cfg, hidden.expand(1, count, -1), even)[0]
    assert drawn.mean(0).norm() < 0.02 * drawn.norm(dim=1).mean()


@pytest.mark.parametrize("draw", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_outermost_draws_are_tokens_too(draw: float, checkpoint: Checkpoint) -> None:
    hidden = torch.randn(1, 3, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = head_gradient(checkpoint, checkpoint.config, hidden, torch.full((1, 3), draw))
    assert found.isfinite().all() and found.shape == hidden.shape


@pytest.fixture
def tokens(checkpoint: Checkpoint) -> np.ndarray:
    array: np.ndarray = np.load(Path(checkpoint.path) / "eval_tokens.npy")
    return array
