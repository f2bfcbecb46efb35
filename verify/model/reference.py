"""The reference forward pass of MiniMax-M2 in torch, straight from a checkpoint's weights.

Every built file is judged against it. All tokens pass through one layer before the next is read, only routed experts
are read, and one expert is held at a time, so the 229B model runs in the memory of its activations. Weights come from
anything with `weight(name)`: the FP8 checkpoint, or a decoded HFQ file (`decoded.py`). The arithmetic is done in the
dtype of `hidden` (f32 unless asked otherwise), on its device. An Observer sees every matrix's inputs, which is how
importances and second moments are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...formats.minimax import ModelConfig, expert_name, layer_prefix


class Weights(Protocol):
    """Anything that hands out one dequantised tensor at a time, in the basis of the original checkpoint."""

    def weight(self, name: str) -> NDArray[np.float32]: ...


@runtime_checkable
class RowWeights(Weights, Protocol):
    """One that can also read rows of the vocabulary's matrices, which are never held whole then."""

    def rows(self, name: str, low: int, high: int) -> NDArray[np.float32]: ...


@runtime_checkable
class TensorWeights(Protocol):
    """A layer whose tensors exist in torch already, in the dtype and on the device of what passes through it.

    They may have gradients.
    """

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Routing:
    """Which experts each token takes: ids i64 [n, k], best first, and their weights [n, k], which sum to 1."""

    ids: Tensor
    weights: Tensor


Matrices = tuple[Tensor, Tensor, Tensor]
"""w1, w3 and w2 of an expert."""
Linear = Callable[[Tensor, Tensor], Tensor]
"""x · weightsᵀ of rows x and weights."""


class Observer:
    """Sees the inputs of every matrix of a layer; override what is needed. Rows are tokens, n = n_seq · len of them."""

    def dense(self, layer: int, projection: str, inputs: Tensor) -> None:
        """The inputs [n, K] of an attention projection: q_proj, k_proj, v_proj or o_proj; some rows after others."""

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        """The normed inputs [n, H] that the router and all experts of a layer see, and the router's choice."""

    def expert(self, layer: int, expert: int, tokens: Tensor, inputs: Tensor, product: Tensor) -> None:
        """One expert's rows: token indices i64 [m], what w1 and w3 see [m, H], and what w2 sees [m, I]."""


SILENT = Observer()
ROWS = 1 << 13
"""Rows of a vocabulary's matrix that are read at a time."""
SCORES = 128 << 20
"""Scores of attention that a GPU holds at once (512 MiB in f32). Launching work for one sequence after the other would
take longer than the work.
"""


def load(weights: Weights | TensorWeights, name: str, like: Tensor) -> Tensor:
    """One tensor of the provider in the dtype and on the device of `like`."""
    if isinstance(weights, TensorWeights):
        return weights.tensor(name)
    array = np.ascontiguousarray(weights.weight(name))
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(like)


def load_expert(weights: Weights | TensorWeights, layer: int, expert: int, like: Tensor) -> Matrices:
    """The matrices of an expert, as `load` gives them."""
    w1, w3, w2 = (load(weights, expert_name(layer, expert, w), like) for w in ("w1", "w3", "w2"))
    return w1, w3, w2


def blocks(weights: Weights, name: str, count: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, f32 rows) of a matrix of `count` rows, ROWS at a time where the provider can do that."""
    if not isinstance(weights, RowWeights):
        yield 0, weights.weight(name)
        return
    for low in range(0, count, ROWS):
        yield low, weights.rows(name, low, min(low + ROWS, count))


def embed(weights: Weights, tokens: NDArray[np.integer], dtype: torch.dtype = torch.float32) -> Tensor:
    """Token ids [n_seq, len] to the residual stream [n_seq, len, H], on the CPU; only their rows are read."""
    name, ids = "model.embed_tokens.weight", np.asarray(tokens, np.int64)
    if not isinstance(weights, RowWeights):
        return load(weights, name, torch.empty(0))[torch.from_numpy(ids)].to(dtype)
    wanted, places = np.unique(ids, return_inverse=True)
    table = np.concatenate([weights.rows(name, i, i + 1) for i in wanted.tolist()])
    return torch.from_numpy(table[places.reshape(ids.shape)]).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x · weight / rms(x) over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_tables(cfg: ModelConfig, positions: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin f64 [positions, rotary_dim / 2] of pos · theta^(-2i / rotary_dim)."""
    inverse = cfg.rope_theta ** (-np.arange(0, cfg.rotary_dim, 2) / cfg.rotary_dim)
    angle = np.arange(positions)[:, None] * inverse
    return np.cos(angle), np.sin(angle)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + rotary/2) of the first rotary dimensions of heads [..., len, head_dim]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attention(
    weights: Weights | TensorWeights,
    cfg: ModelConfig,
    layer: int,
    hidden: Tensor,
    observer: Observer = SILENT,
) -> Tensor:
    """The attention block's addition to the residual stream, [n_seq, len, H], causal within each sequence.

    Scores [heads, len, len] are held of one sequence at a time, and on a GPU of as many as SCORES allows.
    """
    p, (n_seq, length, _) = layer_prefix(layer), hidden.shape
    norm = load(weights, f"{p}input_layernorm.weight", hidden)
    t = rms_norm(hidden, norm, cfg.rms_norm_eps)
    tables = [torch.from_numpy(t).to(hidden, non_blocking=True) for t in rope_tables(cfg, length)]

    def project(name: str, heads: int) -> Tensor:
        observer.dense(layer, f"{name}_proj", t.flatten(0, 1))
        out = F.linear(t, load(weights, f"{p}self_attn.{name}_proj.weight", hidden))
        if name != "v":
            out = rms_norm(out, load(weights, f"{p}self_attn.{name}_norm.weight", hidden), cfg.rms_norm_eps)
        out = out.view(n_seq, length, heads, cfg.head_dim).transpose(1, 2)
        return out if name == "v" else _rotate(out, tables[0], tables[1])

    q = project("q", cfg.num_attention_heads)
    k, v = (project(name, cfg.num_key_value_heads) for name in "kv")
    mixed = torch.empty_like(q)
    together = max(1, SCORES // (cfg.num_attention_heads * length**2)) if hidden.is_cuda else 1
    for n in range(0, n_seq, together):
        some = slice(n, n + together)
        mixed[some] = _causal(q[some], k[some], v[some])
    flat = mixed.transpose(1, 2).reshape(n_seq, length, cfg.q_dim)
    observer.dense(layer, "o_proj", flat.flatten(0, 1))
    return F.linear(flat, load(weights, f"{p}self_attn.o_proj.weight", hidden))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q [n, heads, len, d] over k, v [n, kv, len, d]; query heads share kv heads in order."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    out: Tensor = scores.masked_fill_(future, -torch.inf).softmax(-1) @ v
    return out


def route(weights: Weights | TensorWeights, cfg: ModelConfig, layer: int, inputs: Tensor) -> Routing:
    """The router's choice for normed inputs [n, H]: top k of sigmoid + bias, ties to the lower index."""
    moe = f"{layer_prefix(layer)}block_sparse_moe."
    scores = F.linear(inputs, load(weights, f"{moe}gate.weight", inputs)).sigmoid()
    choice = scores + load(weights, f"{moe}e_score_correction_bias", inputs)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : cfg.num_experts_per_tok]
    chosen = scores.gather(1, ids)
    return Routing(ids, chosen / chosen.sum(-1, keepdim=True))


def experts(
    weights: Weights | TensorWeights,
    cfg: ModelConfig,
    layer: int,
    inputs: Tensor,
    routing: Routing,
    observer: Observer = SILENT,
) -> Tensor:
    """The weighted sum of the routed experts' outputs [n, H] for normed inputs [n, H]."""
    out = torch.zeros_like(inputs)
    for e, taken in choices_by_expert(routing.ids, cfg.num_local_experts):
        matrices = load_expert(weights, layer, e, inputs)
        tokens, x, product = add_expert(out, matrices, inputs, routing, taken)
        observer.expert(layer, e, tokens, x, product)
    return out


def by_expert(ids: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Places in ids i64 [n, k], read row by row, sorted by the expert that stands there, i64 [n · k]; and how many each
    expert has. Those of one expert ascend.
    """
    ordered, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(count, device=ids.device), right=True).tolist()
    return order, [end - start for start, end in pairwise([0, *ends])]


def choices_by_expert(ids: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """For each expert that is chosen, where in ids i64 [n, k], read row by row, it stands; i64 [m], ascending.

    Waits for a device once, not for each expert.
    """
    order, sizes = by_expert(ids, count)
    for e, taken in enumerate(torch.split(order, sizes)):
        if len(taken):
            yield e, taken


def add_expert(
    out: Tensor, matrices: Matrices, inputs: Tensor, routing: Routing, taken: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to out [n, H] what an expert of these matrices makes of the inputs [n, H] that are routed to it.

    `taken` is where in the routing's ids it stands. Returns the indices of its tokens, what w1 and w3 see and what w2
    sees.
    """
    tokens = taken // routing.ids.shape[1]
    x = inputs[tokens]
    product, made = run_expert(matrices, x)
    out.index_add_(0, tokens, made * routing.weights.flatten()[taken, None])
    return tokens, x, product


def run_expert(matrices: Matrices, x: Tensor, linear: Linear = F.linear) -> tuple[Tensor, Tensor]:
    """What w2 of an expert with these matrices sees of rows [m, H], [m, I], and what it makes of it, [m, H]; `linear`
    multiplies rows by a transposed matrix.
    """
    w1, w3, w2 = matrices
    product = F.silu(linear(x, w1)) * linear(x, w3)
    return product, linear(product, w2)


def before_experts(
    weights: Weights | TensorWeights,
    cfg: ModelConfig,
    layer: int,
    hidden: Tensor,
    observer: Observer = SILENT,
) -> tuple[Tensor, Tensor, Routing]:
    """A layer as far as its experts: the residual stream [n_seq, len, H] behind attention, and what router and experts
    see of it, [n, H], with the router's choice.
    """
    hidden = hidden + attention(weights, cfg, layer, hidden, observer)
    return hidden, *into_experts(weights, cfg, layer, hidden, observer)


def into_experts(
    weights: Weights | TensorWeights,
    cfg: ModelConfig,
    layer: int,
    hidden: Tensor,
    observer: Observer = SILENT,
) -> tuple[Tensor, Routing]:
    """What router and experts see of the residual stream [n_seq, len, H] behind attention, [n, H], and the router's
    choice.
    """
    norm = load(weights, f"{layer_prefix(layer)}post_attention_layernorm.weight", hidden)
    t = rms_norm(hidden, norm, cfg.rms_norm_eps).flatten(0, 1)
    routing = route(weights, cfg, layer, t)
    observer.routed(layer, t, routing)
    return t, routing


def layer_forward(
    weights: Weights | TensorWeights,
    cfg: ModelConfig,
    layer: int,
    hidden: Tensor,
    observer: Observer = SILENT,
) -> Tensor:
    """One decoder layer: the residual stream [n_seq, len, H] before it to the one after it."""
    hidden, t, routing = before_experts(weights, cfg, layer, hidden, observer)
    return hidden + experts(weights, cfg, layer, t, routing, observer).view_as(hidden)


def layer_by_layer(
    weights: Weights,
    cfg: ModelConfig,
    tokens: NDArray[np.integer],
    observer: Observer = SILENT,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (layer, residual stream [n_seq, len, H] after it) for token ids [n_seq, len]."""
    hidden = embed(weights, tokens, dtype)
    for layer in range(cfg.num_hidden_layers):
        hidden = layer_forward(weights, cfg, layer, hidden, observer)
        yield layer, hidden


def head_matrix(weights: Weights, cfg: ModelConfig, like: Tensor) -> Tensor:
    """lm_head [vocab, H] in the dtype and on the device of `like`, read some rows at a time."""
    head = like.new_empty(cfg.vocab_size, cfg.hidden_size)
    for low, rows in blocks(weights, "lm_head.weight", cfg.vocab_size):
        head[low : low + len(rows)] = torch.from_numpy(rows)
    return head


def logits(weights: Weights, cfg: ModelConfig, hidden: Tensor) -> Iterator[Tensor]:
    """Yield each sequence's next-token logits [len, vocab] from hidden [n_seq, len, H]; lm_head is read once."""
    norm, head = load(weights, "model.norm.weight", hidden), head_matrix(weights, cfg, hidden)
    for sequence in hidden:
        yield F.linear(rms_norm(sequence, norm, cfg.rms_norm_eps), head)
