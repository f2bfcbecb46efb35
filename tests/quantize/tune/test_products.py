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
    several = torch.from_numpy(np.stack([codes[::-1], codes]))
    given = (torch.from_numpy(heads)[None], several, torch.tensor([1], dtype=torch.int32))
    for dtype in (torch.float32, torch.bfloat16):
        got = dequantised(*given, isinstance(fmt, AffineFormat), dtype)[0]
        torch.testing.assert_close(got, torch.from_numpy(fmt.decode(payload)).to(dtype), rtol=0, atol=0)


def plain(heads: torch.Tensor, codes: torch.Tensor, even: bool) -> torch.Tensor:
    """The matrix's values as plain torch differentiates them."""
    if even:
        return heads[:, 1:] + heads[:, :1] * codes.to(heads.dtype)
    return heads.gather(1, codes.long())


@ids
@pytest.mark.parametrize("chosen", [[0], [2, 0]], ids=["one", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_gradients_are_those_of_plain_torch(
    fmt: LloydFormat | AffineFormat, chosen: list[int], dtype: torch.dtype
) -> None:
    even = isinstance(fmt, AffineFormat)
    matrices = [random_matrix(fmt, seed=seed) for seed in range(3)]  # [3, 512] each, in six groups
    heads, codes = (torch.from_numpy(np.stack(part)) for part in zip(*matrices, strict=True))
    x, weight = torch.randn(len(chosen), 5, 512), torch.randn(len(chosen), 5, 3)
    mine = [x.to(dtype).requires_grad_(), heads[chosen].requires_grad_()]
    theirs = [mine[0].detach().double().requires_grad_(), heads[chosen].double().requires_grad_()]
    ours = products(mine[0], mine[1], codes, torch.tensor(chosen, dtype=torch.int32), even)
    values = torch.stack(
        [plain(of, codes[e], even).view(3, 512) for e, of in zip(chosen, theirs[1], strict=True)]
    )
    true = theirs[0] @ values.mT
    (ours * weight).sum().backward()
    (true * weight.double()).sum().backward()
    assert ours.dtype == torch.float32
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (0.02, 0.01)
    pairs = [(ours, true)] + [(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True)]
    for got, expected in pairs:
        assert got is not None and expected is not None
        size = float(expected.detach().abs().max())
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * size)


def test_nothing_of_the_matrix_s_size_is_saved_for_the_way_back() -> None:
    heads, codes = (torch.from_numpy(part) for part in random_matrix(MQ2_LLOYD, groups=64))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.randn(1, 2, 1024, requires_grad=True)
        products(x, heads[None].requires_grad_(), codes[None], torch.zeros(1, dtype=torch.int32), False)
    floats = [t.numel() for t in saved if t.dtype == torch.float32]
    assert max(floats) <= 2 * 1024
    assert [t.data_ptr() for t in saved if t.dtype == torch.uint8] == [codes.data_ptr()]


@pytest.mark.parametrize("count", [4, 8, 16])
def test_sums_by_masks_are_those_by_codes(count: int) -> None:
    """A GPU sums by masks, since it has no other way with a fixed order."""
    gradient, codes = torch.randn(1, 7, 256), torch.randint(0, count, (1, 7, 256), dtype=torch.uint8)
    masks = torch.stack([(gradient * (codes == k)).sum(-1) for k in range(count)], -1)
    only = torch.zeros(1, dtype=torch.int32)
    torch.testing.assert_close(head_gradient(gradient, codes, only, count, False), masks)


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
