"""Products of stored matrices: the values of the format, the gradients of plain torch, and the format's rotation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.blocks import (
    MQ2_LLOYD,
    MQ3_LLOYD,
    MQ4,
    MQ4_LLOYD,
    MQ6,
    AffineFormat,
    LloydFormat,
    pack_bits,
)
from mq_quant.formats.fwht import rotate
from mq_quant.quantize.tune.placement import Placement
from mq_quant.quantize.tune.products import (
    dequantised,
    head_gradient,
    permuted,
    products,
    returned,
    rotated,
    spread,
    unpacked,
)

ROTATED = [MQ2_LLOYD, MQ3_LLOYD, MQ4, MQ6, MQ4_LLOYD]
ids = pytest.mark.parametrize("fmt", ROTATED, ids=lambda fmt: fmt.name)


def random_matrix(
    fmt: LloydFormat | AffineFormat, groups: int = 6, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Heads f32 [G, n] that f16 holds exactly, and codes u8 [G, 256]."""
    random = np.random.default_rng(seed)
    count = 2 if isinstance(fmt, AffineFormat) else fmt.levels
    heads = random.normal(size=(groups, count)).astype(np.float16).astype(np.float32)
    return heads, random.integers(0, fmt.levels, (groups, 256), np.uint8)


@given(st.sampled_from([2, 3, 4, 6]), st.integers(1, 3), st.integers(0, 1 << 32))
def test_codes_are_unpacked_as_the_format_packs_them(bits: int, groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (groups, 256), np.uint8)
    packed = torch.from_numpy(pack_bits(codes, bits))
    np.testing.assert_array_equal(unpacked(packed, bits).numpy(), codes)


@ids
def test_values_have_the_bits_of_the_format(fmt: LloydFormat | AffineFormat) -> None:
    heads, codes = random_matrix(fmt)
    if isinstance(fmt, AffineFormat):
        payload = fmt.pack(heads[:, 0], heads[:, 1], codes)
    else:
        payload = fmt.pack(heads.astype(np.float16), codes)
    got = dequantised(torch.from_numpy(heads), torch.from_numpy(codes), isinstance(fmt, AffineFormat))
    np.testing.assert_array_equal(got.numpy(), fmt.decode(payload))


def plain(heads: torch.Tensor, codes: torch.Tensor, even: bool) -> torch.Tensor:
    """The matrix's values as plain torch differentiates them."""
    if even:
        return heads[:, 1:] + heads[:, :1] * codes.to(heads.dtype)
    return heads.gather(1, codes.long())


@ids
@pytest.mark.parametrize("together", [1, 3])
def test_gradients_are_those_of_plain_torch(fmt: LloydFormat | AffineFormat, together: int) -> None:
    even = isinstance(fmt, AffineFormat)
    matrices = [random_matrix(fmt, seed=seed) for seed in range(together)]  # [3, 512] each, in six groups
    heads, codes = (torch.from_numpy(np.stack(part)) for part in zip(*matrices, strict=True))
    x, weight = torch.randn(together, 5, 512), torch.randn(together, 5, 3)
    mine = [x.clone().requires_grad_(), heads.clone().requires_grad_()]
    theirs = [x.double().requires_grad_(), heads.double().requires_grad_()]
    ours = products(mine[0], mine[1], codes, even)
    values = torch.stack([plain(theirs[1][i], codes[i], even).view(3, 512) for i in range(together)])
    true = theirs[0] @ values.mT
    torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)
    (ours * weight).sum().backward()
    (true * weight.double()).sum().backward()
    for got, expected in zip(mine, theirs, strict=True):
        assert got.grad is not None and expected.grad is not None
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_matrix_s_size_is_saved_for_the_way_back() -> None:
    heads, codes = (torch.from_numpy(part) for part in random_matrix(MQ2_LLOYD, groups=64))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.randn(1, 2, 1024, requires_grad=True)
        products(x, heads[None].requires_grad_(), codes[None], False)
    floats = [t.numel() for t in saved if t.dtype == torch.float32]
    assert max(floats) <= 2 * 1024
    assert sum(t.numel() * t.element_size() for t in saved) < 2 * codes.numel()


@pytest.mark.parametrize("count", [4, 8, 16])
def test_sums_by_masks_are_those_by_codes(count: int) -> None:
    """A GPU sums by masks, since it has no other way with a fixed order."""
    gradient, codes = torch.randn(7, 256), torch.randint(0, count, (7, 256), dtype=torch.uint8)
    masks = torch.stack([(gradient * (codes == k)).sum(-1) for k in range(count)], -1)
    torch.testing.assert_close(head_gradient(gradient, codes, count, False), masks)


@pytest.mark.parametrize("together", [1, 2, 8])
def test_rows_spread_and_brought_back_keep_their_gradients(together: int) -> None:
    ids = torch.tensor([[0, 2], [2, 3], [3, 0], [2, 0]])
    placement = Placement.of(ids, 5, together)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(returned(spread(x, placement, 2), placement), x.repeat_interleave(2, 0))
    y = torch.randn(len(placement.used), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: returned(y, placement), y)
    # A place that is left over holds some token and has no gradient, as `returned` sees to.
    assert torch.autograd.gradcheck(lambda x: returned(spread(x, placement, 2), placement), x)
    order = torch.tensor([3, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda x: permuted(x, order), x)


def test_the_rotation_is_the_format_s() -> None:
    x = np.random.default_rng(2).normal(size=(3, 512)).astype(np.float32)
    np.testing.assert_allclose(rotated(torch.from_numpy(x)).numpy(), rotate(x), atol=1e-5)
