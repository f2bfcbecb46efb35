"""Products of f32 matrices on tensor cores, which multiply bf16 ten times as fast as a GPU multiplies f32.

An f32 is the sum of two bf16, but for 2⁻¹⁶ of it, so that a product of two f32 is that of their high parts and those of
one high part and one low part. All three are one product of matrices three times as deep, whose sums are f32: it is
wrong by 2⁻¹⁴ of the sum of what it adds up at worst. So large products are made where there are such units; others have
the precision of f32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WORTH = 1 << 35
"""Multiplications from which on a product takes longer than it takes to split its matrices."""
ROWS = 1 << 14
"""Rows that are split at a time: their parts take as much memory again and half of that."""


def linear(x: Tensor, weights: Tensor) -> Tensor:
    """x · weightsᵀ f32 [n, R] of x f32 [n, K] and weights f32 [R, K]."""
    if not _splits(x, len(x) * weights.numel()):
        return x @ weights.mT
    across = in_parts(weights, 1, low=1).mT
    made = [_on_tensor_cores(in_parts(some, 1, low=2), across) for some in torch.split(x, ROWS)]
    return made[0] if len(made) == 1 else torch.cat(made)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ · b f32 [K, M] of a f32 [n, K] and b f32 [n, M]; the same tensor twice is split once."""
    if not _splits(a, a.numel() * b.shape[1]):
        return a.mT @ b
    if a is b:
        both = in_parts(a, 0, low=2, count=4)  # all but the last are those of a, all but the first those of b
        return _on_tensor_cores(both[: 3 * len(a)].mT, both[len(a) :])
    return _on_tensor_cores(in_parts(a, 0, low=2).mT, in_parts(b, 0, low=1))


def in_parts(values: Tensor, axis: int, low: int, count: int = 3) -> Tensor:
    """A matrix f32 in `count` parts that follow each other on an axis, bf16: what is left of it is at the place `low`,
    from 1 on, and its high part at the others.
    """
    shape = [count * n if at == axis else n for at, n in enumerate(values.shape)]
    parts = values.new_empty(shape, dtype=torch.bfloat16)
    high, *others = parts.chunk(count, axis)
    high.copy_(values)
    for place, other in enumerate(others, 1):
        if place == low:
            torch.sub(values, high, out=other)
        else:
            other.copy_(high)
    return parts


def _splits(values: Tensor, multiplications: int) -> bool:
    return multiplications >= WORTH and _has_tensor_cores(values.device)


def _on_tensor_cores(a: Tensor, b: Tensor) -> Tensor:
    """a · b f32 of bf16."""
    return torch.mm(a, b, out_dtype=torch.float32)


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies bf16 on tensor cores of NVIDIA's. Torch has no such product with sums in f32 for
    others.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
