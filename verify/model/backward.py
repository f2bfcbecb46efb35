"""Back through the reference forward pass: the gradient of what a model says, with respect to its residual stream.

Only activations have gradients. One expert's weights and one group of sequences are held at a time, so that memory is
that of the forward pass; sums are taken in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...formats.minimax import ModelConfig, expert_name
from .device_weights import DeviceWeights
from .reference import (
    Routing,
    TensorWeights,
    Weights,
    before_experts,
    head_matrix,
    load,
    rms_norm,
    run_expert,
)
from .spread_forward import beside_experts, rounds, routed

TOGETHER = 8
"""Sequences whose attention has its gradients held at once."""


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
    weights: Weights | DeviceWeights, cfg: ModelConfig, layer: int, hidden: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient [n_seq, len, H] with respect to the stream that enters a layer, from the one behind it.

    `hidden` [n_seq, len, H] is the stream that enters. Who takes which experts is held as it is. Where the weights lie
    on several devices, sequences and experts are spread over them as `spread_forward` does it, with the bits of one.
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
    with torch.no_grad():
        seen = [before_experts(there[place], cfg, layer, x)[1:] for place, x, _ in groups]
    inputs, ids, shares = (
        torch.cat([part.to(hidden.device) for part in parts])
        for parts in zip(*((t, routing.ids, routing.weights) for t, routing in seen), strict=True)
    )
    below = _experts_backward(weights, cfg, layer, inputs, ids, shares, gradient.flatten(0, 1))
    sizes = [x.shape[0] * x.shape[1] for _, x, _ in groups]
    found = []
    for (place, x, g), *given in zip(groups, *(torch.split(part, sizes) for part in below), strict=True):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            stream, t, routing = before_experts(there[place], cfg, layer, x)
        behind = [part.to(x.device) for part in (g, *given)]
        found += torch.autograd.grad((stream, t, routing.weights), x, behind)
    return torch.cat([part.to(hidden.device) for part in found])


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
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to what the experts of a layer see, [n, H], and to their weights in the sum, [n, k]."""
    devices = _devices(weights, inputs)
    there, order, sizes = routed(devices, cfg, inputs, Routing(ids, shares))
    behind, taken = [gradient.to(device) for device in devices], torch.split(order, sizes)
    of_inputs, of_shares = torch.zeros_like(inputs), torch.zeros_like(shares).flatten()
    for some in rounds(sizes, len(devices)):
        found = {}
        for e in some:
            place = weights.place(e) if isinstance(weights, DeviceWeights) else 0
            seen, tokens = there[place], there[place].tokens[e]
            x, share = seen.inputs[tokens].requires_grad_(), seen.shares[e].clone().requires_grad_()
            w1, w3, w2 = (load(weights, expert_name(layer, e, w), x) for w in ("w1", "w3", "w2"))
            with torch.enable_grad():
                out = run_expert((w1, w3, w2), x)[1] * share
            found[e] = torch.autograd.grad(out, (x, share), behind[place][tokens])
        back = {e: [part.to(inputs.device) for part in made] for e, made in found.items()}
        for e, (of_x, of_share) in back.items():
            of_inputs.index_add_(0, there[0].tokens[e], of_x)
            of_shares[taken[e]] = of_share[:, 0]
    return of_inputs, of_shares.view_as(shares)
