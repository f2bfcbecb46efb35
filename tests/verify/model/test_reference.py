"""The reference forward against transformers' own MiniMax-M2, and its promises about what it reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.minimax import ModelConfig, expert_name
from mq_quant.verify.model import reference
from mq_quant.verify.model.reference import Observer, Routing, embed, layer_by_layer, logits, route
from transformers_model import huggingface


class Routes(Observer):
    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []

    def routed(self, layer: int, inputs: torch.Tensor, routing: Routing) -> None:
        self.ids.append(routing.ids)


def test_agrees_with_transformers(checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    routes = Routes()
    ours = [h for _, h in layer_by_layer(checkpoint, checkpoint.config, tokens, routes)]
    model = huggingface(checkpoint)
    chosen: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
        layer.register_forward_hook(lambda _m, _i, out: states.append(out))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits
    assert len(states) == len(ours) == checkpoint.config.num_hidden_layers
    for mine, other in zip(ours, states, strict=True):
        cosine = torch.cosine_similarity(mine.double(), other.double(), dim=-1)
        assert cosine.min() >= 0.999999
        assert (mine - other).abs().max() <= 1e-3 * other.abs().max()
    for mine, other in zip(routes.ids, chosen, strict=True):
        assert torch.equal(mine.sort(-1).values, other.sort(-1).values)
    for s, mine in enumerate(logits(checkpoint, checkpoint.config, ours[-1])):
        assert torch.cosine_similarity(mine.double(), theirs[s].double(), dim=-1).min() >= 0.999999


@pytest.fixture
def tokens(checkpoint: Checkpoint) -> np.ndarray:
    array: np.ndarray = np.load(Path(checkpoint.path) / "eval_tokens.npy")
    return array


class Reads:
    """A provider that counts what is read of another one."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner
        self.names: Counter[str] = Counter()

    def weight(self, name: str) -> np.ndarray:
        self.names[name] += 1
        return self.inner.weight(name)

    def rows(self, name: str, low: int, high: int) -> np.ndarray:
        self.names[name] += 1
        return self.inner.rows(name, low, high)


def test_reads_only_routed_experts_and_each_once(checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    reads, routes = Reads(checkpoint), Routes()
    for _ in layer_by_layer(reads, checkpoint.config, tokens[:1, :1], routes):
        pass
    expected = {
        expert_name(layer, e, w)
        for layer, ids in enumerate(routes.ids)
        for e in ids.flatten().tolist()
        for w in ("w1", "w2", "w3")
    }
    assert {n for n in reads.names if ".experts." in n} == expected
    assert len(expected) == 2 * 8 * 3
    assert set(reads.names.values()) == {1}


def test_positions_after_do_not_matter(checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    whole = [h for _, h in layer_by_layer(checkpoint, checkpoint.config, tokens)][-1]
    part = [h for _, h in layer_by_layer(checkpoint, checkpoint.config, tokens[1:, :7])][-1]
    torch.testing.assert_close(whole[1:, :7], part, rtol=1e-4, atol=1e-4)


class Rows(Observer):
    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = cfg
        self.seen: dict[int, int] = {}
        self.dense_seen: Counter[tuple[int, str]] = Counter()
        self.inputs: torch.Tensor

    def dense(self, layer: int, projection: str, inputs: torch.Tensor) -> None:
        width = self.cfg.q_dim if projection == "o_proj" else self.cfg.hidden_size
        assert inputs.shape[1] == width
        self.dense_seen[layer, projection] += len(inputs)

    def routed(self, layer: int, inputs: torch.Tensor, routing: Routing) -> None:
        self.inputs = inputs
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(len(inputs)))

    def expert(
        self, layer: int, expert: int, tokens: torch.Tensor, inputs: torch.Tensor, product: torch.Tensor
    ) -> None:
        assert torch.equal(inputs, self.inputs[tokens])
        assert product.shape == (len(tokens), self.cfg.intermediate_size)
        self.seen[layer] = self.seen.get(layer, 0) + len(tokens)


def test_observer_sees_every_row(checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    rows = Rows(checkpoint.config)
    for _ in layer_by_layer(checkpoint, checkpoint.config, tokens, rows):
        pass
    assert rows.seen == {0: tokens.size * 8, 1: tokens.size * 8}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert rows.dense_seen == {(layer, name): tokens.size for layer in (0, 1) for name in names}


def test_ties_in_the_router_go_to_the_lower_index(checkpoint: Checkpoint) -> None:
    cfg = checkpoint.config

    class Flat:
        def weight(self, name: str) -> np.ndarray:
            return np.zeros_like(checkpoint.weight(name))

    routing = route(Flat(), cfg, 0, torch.ones(3, cfg.hidden_size))
    assert routing.ids.tolist() == [list(range(cfg.num_experts_per_tok))] * 3


def test_reading_by_rows_is_reading_whole(checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    """A provider without rows, and one whose lm_head comes in pieces, give the same as the checkpoint."""

    class Whole:
        def weight(self, name: str) -> np.ndarray:
            return checkpoint.weight(name)

    cfg = checkpoint.config
    by_rows, whole = embed(checkpoint, tokens), embed(Whole(), tokens)
    assert torch.equal(by_rows, whole)
    expected = list(logits(Whole(), cfg, whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ROWS", 100)
        for a, b in zip(logits(checkpoint, cfg, by_rows), expected, strict=True):
            assert torch.equal(a, b)
