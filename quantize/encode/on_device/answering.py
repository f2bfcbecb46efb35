"""Down answers gate and up, in torch: what `encode.answering` does, on a device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ....awq.own_moments import CHUNK
from ....verify.model.products import inner, linear
from ..answering import RIDGE
from .moments import eye


def product(inputs: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """What w2 sees of inputs f32 [n, hidden]: silu(x·w1ᵀ) · (x·w3ᵀ), f32 [n, intermediate]."""
    gate, up = linear(inputs, torch.cat([w1, w3])).chunk(2, 1)
    return F.silu(gate) * up


def answering_down(w2: Tensor, there: Tensor, here: Tensor) -> Tensor:
    """w2 f32 [hidden, K] fitted so that it makes of `here` f32 [n, K] what the source's w2 makes of `there`.

    Rows that are not finite are left out; without others w2 stays as it is.
    """
    width = w2.shape[1]
    finite = (there.sum(1) + here.sum(1)).isfinite()
    count = finite.sum()
    across, within = (torch.zeros(width, width, dtype=torch.float64, device=w2.device) for _ in range(2))
    for a, b, good in zip(*(torch.split(rows, CHUNK) for rows in (there, here, finite)), strict=True):
        a, b = (torch.where(good[:, None], rows, 0) for rows in (a, b))
        across += inner(a, b)
        within += inner(b, b)
    energy = within.diagonal().mean()
    tie = RIDGE * width / count.clamp_min(1) * energy
    usable = (count > 0) & across.isfinite().all() & within.isfinite().all() & (energy > 0)
    across.diagonal().add_(tie)
    within.diagonal().add_(tie)
    lower, failed = torch.linalg.cholesky_ex(within)
    inverse = torch.linalg.solve_triangular(lower, eye(width, w2.device), upper=False)
    fitted = w2.double() @ across @ inverse.mT @ inverse
    return torch.where(usable & (failed == 0), fitted.float(), w2)
