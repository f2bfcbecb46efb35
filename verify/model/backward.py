"""Back through the reference forward pass: the gradient of what a model says, with respect to its residual stream.

Only activations have gradients. One expert's weights and one group of sequences are held at a time, so that memory is
that of the forward pass; sums are taken in one order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...formats.minimax import ModelConfig, expert_name
from .reference import (
    TensorWeights,
    Weights,
    before_experts,
    choices_by_expert,
    head_matrix,
    load,
    rms_norm,
    run_expert,
)

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
    weights: Weights | TensorWeights, cfg: ModelConfig, layer: int, hidden: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient [n_seq, len, H] with respect to the stream that enters a layer, from the one behind it.

    `hidden` [n_seq, len, H] is the stream that enters. Who takes which experts is held as it is.
    """
    groups = list(
        zip(
            torch.split(hidden, TOGETHER),
            torch.split(gradient, TOGETHER),
            strict=True,
        )
    )
    with torch.no_grad():
        seen = [before_experts(weights, cfg, layer, x)[1:] for x, _ in groups]
    inputs = torch.cat([t for t, _ in seen])
    ids, shares = (torch.cat([getattr(routing, name) for _, routing in seen]) for name in ("ids", "weights"))
    of_inputs, of_shares = _experts_backward(weights, cfg, layer, inputs, ids, shares, gradient.flatten(0, 1))
    out, start = torch.empty_like(hidden), 0
    for n, (x, g) in enumerate(groups):
        some = slice(start, start + g.shape[0] * g.shape[1])
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            stream, t, routing = before_experts(weights, cfg, layer, x)
        given = g, of_inputs[some], of_shares[some]
        (out[n * TOGETHER : n * TOGETHER + len(g)],) = torch.autograd.grad(
            (stream, t, routing.weights), x, given
        )
        start = some.stop
    return out


def _experts_backward(
    weights: Weights | TensorWeights,
    cfg: ModelConfig,
    layer: int,
    inputs: Tensor,
    ids: Tensor,
    shares: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to what the experts of a layer see, [n, H], and to their weights in the sum, [n, k]."""
    of_inputs, of_shares = torch.zeros_like(inputs), torch.zeros_like(shares).flatten()
    for e, taken in choices_by_expert(ids, cfg.num_local_experts):
        w1, w3, w2 = (load(weights, expert_name(layer, e, w), inputs) for w in ("w1", "w3", "w2"))
        tokens = taken // ids.shape[1]
        x, share = inputs[tokens].requires_grad_(), shares.flatten()[taken].requires_grad_()
        with torch.enable_grad():
            out = run_expert((w1, w3, w2), x)[1] * share[:, None]
        of_x, of_shares[taken] = torch.autograd.grad(out, (x, share), gradient[tokens])
        of_inputs.index_add_(0, tokens, of_x)
    return of_inputs, of_shares.view_as(shares)
