"""Back through the reference forward pass: the gradient of what a model says, with respect to its residual stream.

Only activations have gradients. One expert's weights are held at a time, on several devices those of a round, and of
sequences one group or, on a GPU, as many as fit in a part of its memory; sums are taken in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...formats.minimax import ModelConfig
from .device_weights import DeviceWeights, all_brought
from .lanes import NO_LANES, Lanes
from .reference import (
    Matrices,
    Routing,
    TensorWeights,
    Weights,
    before_experts,
    head_matrix,
    load,
    load_expert,
    rms_norm,
    run_expert,
)
from .spread_forward import beside_experts, experts_of, rounds, routed

TOGETHER = 8
"""Sequences whose attention has its gradients held at once."""
KEPT = 8
"""One part in so many of a GPU's memory is for groups of sequences that wait for the gradients of experts."""


def head_gradient(weights: Weights, cfg: ModelConfig, hidden: Tensor, draws: Tensor) -> Tensor:
    """∂ log p(y) / ∂ hidden [n_seq, len, H] behind the last layer, where each y is drawn from the model's own p.

    `draws` [n_seq, len], even in [0, 1), decide y. The second moment of such gradients is the Fisher information, to
    which the divergence is ½ eᵀ G e for a small error e. lm_head is read once and held.
    """
    norm, head = load(weights, "model.norm.weight", hidden), head_matrix(weights, cfg, hidden)
    return torch.stack(
        [
            _row_gradients(head, norm, cfg.rms_norm_eps, x, u)
            for x, u in zip(hidden, draws.to(hidden), strict=True)
        ]
    )


def _row_gradients(head: Tensor, norm: Tensor, eps: float, hidden: Tensor, draws: Tensor) -> Tensor:
    x = hidden.detach().requires_grad_()
    with torch.enable_grad():
        normed = rms_norm(x, norm, eps)
    p = F.linear(normed.detach(), head).softmax(-1)
    drawn = torch.searchsorted(p.cumsum(-1), draws[:, None]).clamp_(max=len(head) - 1)[:, 0]
    (gradient,) = torch.autograd.grad(normed, x, head[drawn] - p @ head)
    return gradient


def layer_backward(
    weights: Weights | DeviceWeights,
    cfg: ModelConfig,
    layer: int,
    hidden: Tensor,
    gradient: Tensor,
    lanes: Lanes = NO_LANES,
) -> Tensor:
    """The gradient [n_seq, len, H] with respect to the stream that enters a layer, from the one behind it.

    `hidden` [n_seq, len, H] is the stream that enters. Who takes which experts is held as it is. Where the weights lie
    on several devices, sequences and experts are spread over them as `spread_forward` does it, with the bits of one. In
    `lanes` experts run beside each other.
    """
    there: Sequence[Weights | TensorWeights] = [weights]
    if isinstance(weights, DeviceWeights):
        there = beside_experts(weights, cfg, layer)
    devices = _devices(weights, hidden)
    groups = [
        (place := n % len(devices), x.to(devices[place]), g)
        for n, (x, g) in enumerate(
            zip(torch.split(hidden, TOGETHER), torch.split(gradient, TOGETHER), strict=True)
        )
    ]

    def to_experts(place: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Routing]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return x, *before_experts(there[place], cfg, layer, x)

    kept = [to_experts(place, x) for place, x, _ in groups[: _graphs(cfg, groups[0][1]) * len(devices)]]
    with torch.no_grad():
        seen = [(t, routing) for _, _, t, routing in kept]
        seen += [before_experts(there[place], cfg, layer, x)[1:] for place, x, _ in groups[len(kept) :]]
        inputs, ids, shares = (
            torch.cat([part.to(hidden.device) for part in parts])
            for parts in zip(*((t, routing.ids, routing.weights) for t, routing in seen), strict=True)
        )
    del seen
    below = _experts_backward(weights, cfg, layer, inputs, ids, shares, gradient.flatten(0, 1), lanes)
    sizes = [x.shape[0] * x.shape[1] for _, x, _ in groups]
    found: list[Tensor] = []
    for (place, x, g), *given in zip(groups, *(torch.split(part, sizes) for part in below), strict=True):
        x, stream, t, routing = kept.pop(0) if kept else to_experts(place, x)
        behind = [part.to(x.device) for part in (g, *given)]
        found += torch.autograd.grad((stream, t, routing.weights), x, behind)
    return torch.cat([part.to(hidden.device) for part in found])


def _graphs(cfg: ModelConfig, hidden: Tensor) -> int:
    """How many groups of sequences like this one, [n, len, H], a GPU keeps on its way to the experts, with all that its
    gradients need, so that they are not run again; elsewhere none is.
    """
    if not hidden.is_cuda:
        return 0
    room = torch.cuda.get_device_properties(hidden.device).total_memory // KEPT
    return int(room // graph_bytes(cfg, *hidden.shape[:2]))


def graph_bytes(cfg: ModelConfig, sequences: int, length: int) -> int:
    """Bytes in f32 that gradients need of some sequences on their way to the experts: queries before and behind their
    norm, keys and values for each query head, scores, and the streams.
    """
    heads, width = cfg.num_attention_heads * length, 2 * cfg.hidden_size + 2 * cfg.num_local_experts
    return 4 * sequences * length * (4 * cfg.q_dim + cfg.kv_dim + heads + width)


def _devices(weights: Weights | DeviceWeights, hidden: Tensor) -> Sequence[torch.device]:
    return weights.devices if isinstance(weights, DeviceWeights) else (hidden.device,)


def _experts_backward(
    weights: Weights | DeviceWeights,
    cfg: ModelConfig,
    layer: int,
    inputs: Tensor,
    ids: Tensor,
    shares: Tensor,
    gradient: Tensor,
    lanes: Lanes = NO_LANES,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to what the experts of a layer see, [n, H], and to their weights in the sum, [n, k]."""
    devices = _devices(weights, inputs)
    there, order, sizes = routed(devices, cfg, inputs, Routing(ids, shares))
    behind, taken = [gradient.to(device) for device in devices], torch.split(order, sizes)
    of_inputs, of_shares = torch.zeros_like(inputs), torch.zeros_like(shares).flatten()

    def run(e: int, place: int, matrices: Matrices) -> tuple[Tensor, ...]:
        seen, tokens = there[place], there[place].tokens[e]
        x, share = seen.inputs[tokens].requires_grad_(), seen.shares[e].clone().requires_grad_()
        with torch.enable_grad():
            out = run_expert(matrices, x)[1] * share
        return torch.autograd.grad(out, (x, share), behind[place][tokens])

    def run_together(some: Sequence[int]) -> dict[int, tuple[Tensor, ...]]:
        placed = experts_of(weights, layer, some) if isinstance(weights, DeviceWeights) else {}
        found = {}
        with lanes.opened():
            for n, e in enumerate(some):
                place = weights.place(e) if isinstance(weights, DeviceWeights) else 0
                with lanes.lane(devices[place], n // len(devices)):
                    found[e] = run(e, place, placed.get(e) or load_expert(weights, layer, e, inputs))
        return found

    for some in rounds(sizes, len(devices)):
        found = run_together(some)
        of_x, of_share = (
            all_brought({e: made[n] for e, made in found.items()}, inputs.device) for n in range(2)
        )
        for e in some:
            of_inputs.index_add_(0, there[0].tokens[e], of_x[e])
            of_shares[taken[e]] = of_share[e][:, 0]
    return of_inputs, of_shares.view_as(shares)
