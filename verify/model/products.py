"""Products of f32 matrices on tensor cores, which multiply bf16 ten times as fast as a GPU multiplies f32.

An f32 is the sum of two bf16, but for 2⁻¹⁶ of it, so that a product of two f32 is that of their high parts and those of
one high part and one low part. All three are one product of matrices three times as deep, whose sums are f32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WORTH = 1 << 35
"""Multiplications from which on a product takes longer than it takes to split its matrices."""
ROWS = 1 << 14
"""Rows that are split at a time: their parts take as much memory again and half of that."""


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a · b f32 [m, n] of a f32 [m, k] and b f32 [k, n]. Where it is large and there are tensor cores, it is wrong by
    2⁻¹⁴ of the sum of what it adds up at worst; else it has the precision of f32.
    """
    (m, k), n = a.shape, b.shape[1]
    if m * n * k < WORTH or not _has_tensor_cores(a.device):
        return a @ b
    made = [torch.mm(*in_parts(some, b), out_dtype=torch.float32) for some in torch.split(a, ROWS)]
    return made[0] if len(made) == 1 else torch.cat(made)


def linear(x: Tensor, weights: Tensor) -> Tensor:
    """x · weightsᵀ f32 [n, R] of x f32 [n, K] and weights f32 [R, K], as `multiply` has it."""
    return multiply(x, weights.mT)


def in_parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices bf16 [m, 3k] and [3k, n] whose product is that of a f32 [m, k] and b f32 [k, n]."""
    (high, low), (high_b, low_b) = _split(a), _split(b)
    return torch.cat([high, high, low], 1), torch.cat([high_b, low_b, high_b])


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 whose sum is the value f32, but for 2⁻¹⁶ of it, and which is not finite where that is not."""
    high = values.bfloat16()
    return high, (values - high).bfloat16()


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies bf16 on tensor cores of NVIDIA's. Torch has no such product with sums in f32 for
    others.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
