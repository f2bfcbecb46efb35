"""Products of stored matrices in torch, with gradients for the levels of their groups and none for their codes.

A matrix [R, K] is held as codes u8 [G, 256] and the numbers at the head of each group, f32 [G, n], with G = R·K/256:
the n levels of a codebook, or scale and zero of an even grid. Its values exist only while a product is computed, once
forward and once backward, so that a layer of many experts fits into memory. Every sum has a fixed order, on a GPU
too.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats.fwht import GROUP, rotate
from ...kernels.runtime.host import Backend
from ...kernels.train.levels import level_gradients, spread_levels
from ..encode.gpu_encoder import open_gpu
from ..encode.on_device.factors import borrowed
from .placement import Placement


def unpacked(body: Tensor, bits: int) -> Tensor:
    """Codes u8 [..., n·8/bits] of a stream of `bits` bits each, least significant first, packed as u8 [..., n]."""
    width = math.lcm(bits, 8) // 8
    parts = body.reshape(*body.shape[:-1], -1, width).int()
    words = sum((parts[..., i] << 8 * i for i in range(width)), torch.zeros_like(parts[..., 0]))
    codes = [(words >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(width * 8 // bits)]
    return torch.stack(codes, -1).flatten(-2)


@cache
def _kernels(index: int) -> Backend:
    """A back end whose kernels run in torch's own stream of a GPU, the current one, in turn with what torch does."""
    return open_gpu("cuda", own_stream=False, index=index)


def dequantised(heads: Tensor, codes: Tensor, chosen: Tensor, even: bool, dtype: torch.dtype) -> Tensor:
    """Values [B, G, 256] of the matrices `chosen` i32 [B] among codes u8 [E, G, 256], rounded to `dtype`.

    `heads` f32 [B, G, n] are levels or, of an even grid, (scale, zero). In f32 the bits are those of `Format.decode`.
    """
    if heads.is_cuda:
        values = torch.empty(heads.shape[0], *codes.shape[1:], dtype=dtype, device=codes.device)
        with torch.cuda.device(codes.device):
            there = _kernels(codes.device.index)
            tensors = (_as_stored(values), codes, heads.contiguous(), chosen)
            out, from_codes, levels, which = (borrowed(there, tensor) for tensor in tensors)
            spread_levels(there, out, from_codes, levels, which, even)
        return values
    mine = codes[chosen]
    values = heads[..., 1:] + heads[..., :1] * mine.float() if even else heads.gather(-1, mine.long())
    return values.to(dtype)


def head_gradient(gradient: Tensor, codes: Tensor, chosen: Tensor, count: int, even: bool) -> Tensor:
    """The gradient f32 [B, G, n] of the heads of chosen matrices, from that of their values [B, G, 256]."""
    if gradient.is_cuda:
        sums = torch.empty(*gradient.shape[:2], count, device=codes.device)
        with torch.cuda.device(codes.device):
            there = _kernels(codes.device.index)
            tensors = (sums, _as_stored(gradient.contiguous()), codes, chosen)
            out, of_values, from_codes, which = (borrowed(there, tensor) for tensor in tensors)
            level_gradients(there, out, of_values, from_codes, which, even)
        return sums
    gradient, mine = gradient.float(), codes[chosen]
    if even:
        return torch.stack([(gradient * mine.float()).sum(-1), gradient.sum(-1)], -1)
    return gradient.new_zeros(*gradient.shape[:2], count).scatter_add_(-1, mine.long(), gradient)


def _as_stored(values: Tensor) -> Tensor:
    """Values as the kernels take them: bf16 as u16."""
    return values.view(torch.uint16) if values.dtype == torch.bfloat16 else values


class _Products(torch.autograd.Function):
    """x W^T f32 for x [B, m, K] and B matrices, multiplied in the dtype of x; saves x and heads, but no matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Tensor, codes: Tensor, chosen: Tensor, even: bool) -> Tensor:
        ctx.save_for_backward(x, heads, codes, chosen)
        ctx.even = even
        return torch.bmm(x, _matrices(x, heads, codes, chosen, even).mT).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, heads, codes, chosen = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype)
        of_x = of_heads = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(gradient, _matrices(x, heads, codes, chosen, ctx.even))
        if ctx.needs_input_grad[1]:
            of_values = torch.bmm(gradient.mT, x).view(len(x), -1, GROUP)
            of_heads = head_gradient(of_values, codes, chosen, heads.shape[2], ctx.even)
        return of_x, of_heads, None, None, None


def _matrices(x: Tensor, heads: Tensor, codes: Tensor, chosen: Tensor, even: bool) -> Tensor:
    """Matrices [B, R, K] that x [B, m, K] is multiplied by, in its dtype."""
    return dequantised(heads, codes, chosen, even, x.dtype).view(len(x), -1, x.shape[2])


class _Taken(torch.autograd.Function):
    """x[rows]. The gradient comes from the rows `back` of its own, or is zero where `used` bool says no."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor, used: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, used)
        return x[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, used = ctx.saved_tensors
        of_x = gradients[0][back]
        return of_x if used is None else of_x * used[:, None], None, None, None


class _Spread(torch.autograd.Function):
    """The token of each place, for x [tokens, n] with `count` choices each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, choice: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.count = count
        return x[choice // count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        (gradient,) = gradients
        back = gradient[place].view(-1, ctx.count, gradient.shape[1])
        return back.sum(1), None, None, None


def products(x: Tensor, heads: Tensor, codes: Tensor, chosen: Tensor, even: bool) -> Tensor:
    """x W^T f32 [B, m, R] for x [B, m, K] and the matrices `chosen` i32 [B] among codes u8 [E, G, 256], with heads f32
    [B, G, n].

    They are multiplied in the dtype of x, which may be bf16: products of f32 are exact up to the order of sums.
    """
    out: Tensor = _Products.apply(x, heads, codes, chosen, even)  # type: ignore[no-untyped-call]
    return out


def spread(x: Tensor, placement: Placement, count: int) -> Tensor:
    """Tokens [tokens, n], each with `count` choices, where they are computed: [places, n]."""
    out: Tensor = _Spread.apply(x, placement.place, placement.choice, count)  # type: ignore[no-untyped-call]
    return out


def returned(y: Tensor, placement: Placement) -> Tensor:
    """What was computed [places, n], for each choice in order: [choices, n]."""
    p = placement
    out: Tensor = _Taken.apply(y, p.place, p.choice, p.used)  # type: ignore[no-untyped-call]
    return out


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """x[order] for a permutation i64 [m] of the rows of x [m, ...]."""
    out: Tensor = _Taken.apply(x, order, order.argsort(), None)  # type: ignore[no-untyped-call]
    return out


@cache
def _rotation(device: torch.device) -> Tensor:
    return torch.from_numpy(rotate(np.eye(GROUP, dtype=np.float32))).to(device)


def rotated(x: Tensor) -> Tensor:
    """Each run of 256 along the last axis of x f32 [..., 256·k] rotated as the formats do, up to f32 rounding."""
    return (x.reshape(*x.shape[:-1], -1, GROUP) @ _rotation(x.device)).flatten(-2)
