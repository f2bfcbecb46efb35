"""Known faults of engines, and the hidden states that each of them gives on a kit's models.

The runner holds a dump that departs against these, and names the fault whose states it has. A fault of a product is a
misreading of an expert's matrix, so the reference's own arithmetic serves; attention and routing are written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ....formats.fwht import rotate, unrotate
from ....formats.hfq import HfqFile
from ....formats.hfq.stored import awq_scale
from ....formats.minimax import ModelConfig, expert_of, layer_prefix
from ....verify.model.hfq_weights import DecodedFile
from ....verify.model.reference import Routing, embed, experts, load, rms_norm, rope_tables

F32 = NDArray[np.float32]
Misreading = Callable[[F32, F32], F32]
"""From a matrix in the stored basis [R, K] and the AWQ scale of its columns [K] (ones for down) to the matrix that the
fault in effect multiplies by, in the basis of the checkpoint."""
Norm = Callable[[Tensor, Tensor, ModelConfig], Tensor]
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
Choice = Callable[[Tensor, Tensor, int], Routing]


@dataclass(frozen=True)
class Fault:
    """One fault: the projection that it is in, what it does, and the part of the arithmetic that it replaces."""

    id: str
    projection: str
    sentence: str
    gate_up: Misreading | None = None
    down: Misreading | None = None
    norm: Norm | None = None
    turn: Turn | None = None
    choice: Choice | None = None


# --- products -------------------------------------------------------------------------------------------------------


def _first(columns: Callable[[int], int]) -> Misreading:
    """Only the first columns(K) columns of a row are added up."""

    def read(stored: F32, scale: F32) -> F32:
        kept = stored.copy()
        kept[:, columns(stored.shape[1]) :] = 0
        return _unrotated(kept, scale)

    return read


def _unrotated(stored: F32, scale: F32) -> F32:
    return unrotate(stored) / scale


def _nothing(stored: F32, scale: F32) -> F32:
    return np.zeros_like(stored)


# --- attention ------------------------------------------------------------------------------------------------------


def _flat_norm(x: Tensor, weight: Tensor, cfg: ModelConfig) -> Tensor:
    return rms_norm(x, weight, cfg.rms_norm_eps)


def _norm_per_head(x: Tensor, weight: Tensor, cfg: ModelConfig) -> Tensor:
    heads = (*x.shape[:-1], -1, cfg.head_dim)
    return rms_norm(x.view(heads), weight.view(-1, cfg.head_dim), cfg.rms_norm_eps).view(x.shape)


def _no_norm(x: Tensor, weight: Tensor, cfg: ModelConfig) -> Tensor:
    return x


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.flatten(-2), rest], dim=-1)


def _still(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x


# --- routing --------------------------------------------------------------------------------------------------------


def _chosen(order: Tensor, weights: Tensor, count: int, total: bool = True) -> Routing:
    ids = order.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    kept = weights.gather(1, ids)
    return Routing(ids, kept / kept.sum(-1, keepdim=True) if total else kept)


def _route(scores: Tensor, bias: Tensor, count: int) -> Routing:
    return _chosen(scores + bias, scores, count)


def _biased_weights(scores: Tensor, bias: Tensor, count: int) -> Routing:
    return _chosen(scores + bias, scores + bias, count)


def _no_bias(scores: Tensor, bias: Tensor, count: int) -> Routing:
    return _chosen(scores, scores, count)


def _no_total(scores: Tensor, bias: Tensor, count: int) -> Routing:
    return _chosen(scores + bias, scores, count, total=False)


FAULTS = (
    Fault("down-512", "down", "only the first 512 columns of a row are added up", down=_first(lambda k: 512)),
    Fault(
        "down-1024",
        "down",
        "the columns beyond the last multiple of 1024 are left out",
        down=_first(lambda k: k // 1024 * 1024),
    ),
    Fault("down-missing", "down", "the experts add nothing", down=_nothing),
    Fault(
        "gate-up-512",
        "gate and up",
        "only the first 512 columns of a row are added up",
        gate_up=_first(lambda k: 512),
    ),
    Fault(
        "gate-up-1024",
        "gate and up",
        "the columns beyond the last multiple of 1024 are left out",
        gate_up=_first(lambda k: k // 1024 * 1024),
    ),
    Fault(
        "scale-ignored",
        "AWQ scale",
        "the sidecar awq_scale_gate_up is ignored: inputs of gate and up are not divided by it",
        gate_up=lambda stored, scale: _unrotated(stored, np.ones_like(scale)),
    ),
    Fault(
        "scale-multiplied",
        "AWQ scale",
        "inputs of gate and up are multiplied by the sidecar awq_scale_gate_up and not divided by it",
        gate_up=lambda stored, scale: _unrotated(stored, np.float32(1) / scale),
    ),
    Fault(
        "signs-swapped",
        "rotation",
        "the two sign vectors (seeds 42 and 1042) are swapped",
        gate_up=lambda stored, scale: rotate(stored) / scale,
        down=lambda stored, scale: rotate(stored),
    ),
    Fault(
        "rotation-missing",
        "rotation",
        "inputs of gate, up and down are not rotated",
        gate_up=lambda stored, scale: stored / scale,
        down=lambda stored, scale: stored,
    ),
    Fault(
        "bias-in-weight",
        "router",
        "the routing bias is in the weights of the chosen experts; it decides which are chosen, and nothing else",
        choice=_biased_weights,
    ),
    Fault("bias-ignored", "router", "the routing bias does not take part in the choice", choice=_no_bias),
    Fault(
        "weights-not-divided",
        "router",
        "the weights of the chosen experts are not divided by their sum",
        choice=_no_total,
    ),
    Fault(
        "norm-per-head",
        "attention (q_norm, k_norm)",
        "queries and keys are normed head by head; the norm is over all heads together",
        norm=_norm_per_head,
    ),
    Fault("norm-missing", "attention (q_norm, k_norm)", "queries and keys are not normed", norm=_no_norm),
    Fault(
        "rope-neighbours",
        "attention (rotary embedding)",
        "dimensions 2i and 2i + 1 are turned together; the pairs are i and i + 32",
        turn=_neighbours,
    ),
    Fault("rope-missing", "attention (rotary embedding)", "queries and keys are not turned", turn=_still),
)
"""Every fault that a kit knows by name."""


class HeldFile(DecodedFile):
    """A decoded file that keeps what it has decoded, for many passes through a small one."""

    def __init__(self, file: HfqFile) -> None:
        super().__init__(file)
        self._stored: dict[str, F32] = {}
        self._weights: dict[str, F32] = {}

    def stored(self, name: str) -> F32:
        if name not in self._stored:
            self._stored[name] = super().stored(name)
        return self._stored[name]

    def weight(self, name: str, fold: F32 | None = None) -> F32:
        if name not in self._weights:
            self._weights[name] = super().weight(name, fold)
        return self._weights[name]


@dataclass(frozen=True)
class Misread:
    """The weights of a file as an engine with a fault in effect multiplies by them."""

    decoded: DecodedFile
    fault: Fault

    def weight(self, name: str) -> F32:
        """One tensor in the basis of the checkpoint."""
        place = expert_of(name)
        read = None if place is None else self.fault.down if place[2] == "w2" else self.fault.gate_up
        if place is None or read is None:
            return self.decoded.weight(name)
        stored = self.decoded.stored(name)
        scale = None if place[2] == "w2" else awq_scale(self.decoded.file, place[0], stored.shape[1])
        return read(stored, np.ones(stored.shape[1], np.float32) if scale is None else scale)


def faulty_states(decoded: DecodedFile, cfg: ModelConfig, tokens: NDArray[np.integer], fault: Fault) -> F32:
    """The residual stream f32 [len, hidden] after layer 0 that an engine with this fault has for token ids [len]."""
    weights = Misread(decoded, fault)
    with torch.inference_mode():
        hidden = embed(weights, np.asarray(tokens)[None], torch.float64)[0]
        hidden = hidden + _attention(weights, cfg, hidden, fault.norm or _flat_norm, fault.turn or _halves)
        p = layer_prefix(0)
        norm = load(weights, f"{p}post_attention_layernorm.weight", hidden)
        t = rms_norm(hidden, norm, cfg.rms_norm_eps)
        scores = F.linear(t, load(weights, f"{p}block_sparse_moe.gate.weight", t)).sigmoid()
        bias = load(weights, f"{p}block_sparse_moe.e_score_correction_bias", t)
        routing = (fault.choice or _route)(scores, bias, cfg.num_experts_per_tok)
        states: F32 = (hidden + experts(weights, cfg, 0, t, routing)).float().numpy()
        return states


def _attention(weights: Misread, cfg: ModelConfig, hidden: Tensor, norm: Norm, turn: Turn) -> Tensor:
    """What attention adds to the stream [len, H] of one sequence."""
    p = layer_prefix(0)
    t = rms_norm(hidden, load(weights, f"{p}input_layernorm.weight", hidden), cfg.rms_norm_eps)
    q, k, v = (F.linear(t, load(weights, f"{p}self_attn.{name}_proj.weight", t)) for name in "qkv")
    q, k = (
        norm(x, load(weights, f"{p}self_attn.{name}_norm.weight", t), cfg) for x, name in ((q, "q"), (k, "k"))
    )
    q, k, v = (x.view(len(t), -1, cfg.head_dim).transpose(0, 1) for x in (q, k, v))
    cos, sin = (torch.from_numpy(table).to(t) for table in rope_tables(cfg, len(t)))
    share = len(q) // len(k)
    q, k, v = turn(q, cos, sin), turn(k, cos, sin).repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(mixed.transpose(0, 1).flatten(1), load(weights, f"{p}self_attn.o_proj.weight", t))
