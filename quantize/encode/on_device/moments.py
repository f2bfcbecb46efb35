"""An expert's own second moment in torch, and how far it is trusted: what `awq.own_moments` does, on a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ....awq.own_moments import CHUNK, FLOOR, SAMPLE
from ....formats.fwht import GROUP, rotate
from ....verify.model.products import inner


@dataclass(frozen=True)
class Whitening:
    """The coordinates in which a moment T f64 [K, K] is about the identity: rows x are x · `turn`, f64 [K, K]. T is
    I - `floor` · turnᵀ · turn there, with floor f64 [], and `energy` f64 [] is the sum of the squares of that.
    """

    turn: Tensor
    floor: Tensor
    energy: Tensor

    def to(self, device: torch.device) -> Whitening:
        """The same on another device."""
        return Whitening(self.turn.to(device), self.floor.to(device), self.energy.to(device))


def whitening(moment: Tensor) -> Whitening | None:
    """The whitening of a moment f64 [K, K]; None where the moment has no energy or is not finite."""
    floor, identity = FLOOR * moment.diagonal().mean(), eye(len(moment), moment.device)
    lower, failed = torch.linalg.cholesky_ex(moment + floor * identity)
    if not bool((failed == 0) & moment.isfinite().all() & (floor > 0)):
        return None
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    turn = inverse.mT.contiguous()
    return Whitening(turn, floor, (identity - floor * (inverse @ turn)).square().sum())


def layer_share(rows: Tensor, layer: Whitening) -> Tensor:
    """ρ f64 [], the layer's share in the moment of an expert that saw these rows f32 [n, K], n at least 2."""
    step = -(-len(rows) // SAMPLE)
    x = rows[::step].double() @ layer.turn
    seen = len(x)
    energy = x.square().sum(1)
    squares = energy.square().sum()
    own = ((x @ x.mT).square().sum() - squares) / max(seen * (seen - 1), 1)
    cross = (energy.sum() - layer.floor * (x @ layer.turn.mT).square().sum()) / seen
    noise = (squares / seen - own).clamp_min(0) / len(rows)
    distance = (own - 2 * cross + layer.energy).clamp_min(0)
    return torch.where(noise + distance > 0, noise / (noise + distance), 1.0)


def own_moment(rows: Tensor) -> Tensor:
    """E[x xᵀ] f64 [K, K] over rows f32 [n, K], exactly symmetric; sums of CHUNK rows are f32, sums of those f64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, CHUNK):
        total += inner(part, part)
    return symmetric(total) / max(len(rows), 1)


def mixed(rows: Tensor, prior: Tensor, white: Whitening | None) -> Tensor:
    """The moment f64 [K, K] of an expert that saw these rows f32 [n, K], drawn toward a prior f64 [K, K].

    `white` is the whitening of the prior.
    """
    if white is None or len(rows) < 2:
        return prior
    share = layer_share(rows, white)
    return torch.where(share < 1, (1 - share) * own_moment(rows) + share * prior, prior)


def rotated_moment(moment: Tensor, damping: float, scale: Tensor | None = None) -> Tensor:
    """The damped moment f64 [K, K] of R·(x/s), where R rotates each group of 256 and s f32 [K] is the scale.

    As `Importance.rotated_moment`; `damping` is the share of the mean energy that every channel gets.
    """
    full = (1 - damping) * moment
    full.diagonal().add_(damping * moment.diagonal().mean())
    if scale is not None:
        inverse = 1 / scale.double()
        full *= inverse[:, None] * inverse
    for _ in range(2):
        full = (full.view(-1, GROUP) @ _rotation(moment.device)).view(full.shape).mT.contiguous()
    return symmetric(full)


def symmetric(full: Tensor) -> Tensor:
    """Matrices [..., n, n] whose lower triangle is that of the upper one."""
    return torch.where(_below(full.shape[-1], full.device), full.mT, full)


@cache
def _below(width: int, device: torch.device) -> Tensor:
    """Which of [width, width] lie below the diagonal, bool."""
    return torch.ones(width, width, dtype=torch.bool, device=device).tril(-1)


@cache
def _rotation(device: torch.device) -> Tensor:
    """f64 [256, 256]: rows of a group times this are rotated. Its entries are ± 1/16."""
    return torch.from_numpy(rotate(np.eye(GROUP, dtype=np.float32))).to(device, torch.float64)


@cache
def eye(width: int, device: torch.device) -> Tensor:
    """The identity f64 [width, width]."""
    return torch.eye(width, dtype=torch.float64, device=device)
