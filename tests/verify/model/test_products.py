"""Products on tensor cores: how near they come to those of f32, and when f32 is multiplied."""

from __future__ import annotations

import pytest
import torch
from mq_quant.verify.model import products
from mq_quant.verify.model.products import in_parts, linear, multiply

SHAPES = [(3, 7, 5), (64, 300, 32), (1, 1, 1)]


def pair(m, k, n, spread=1.0):
    """Matrices whose values have very different sizes, with their product in f64 and what it adds up in all."""
    of = torch.Generator().manual_seed(m + k)
    a, b = (
        torch.randn(shape, generator=of) * 10 ** (spread * torch.randn(shape, generator=of))
        for shape in ((m, k), (k, n))
    )
    return a, b, a.double() @ b.double(), a.double().abs() @ b.double().abs()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_parts_have_the_product_of_the_whole_to_fourteen_bits(shape, spread):
    a, b, want, added = pair(*shape, spread)
    high, low = in_parts(a, b)
    assert (high.dtype, low.dtype, high.shape[1]) == (torch.bfloat16, torch.bfloat16, 3 * shape[1])
    assert ((high.double() @ low.double() - want).abs() <= 2**-14 * added).all()


def test_high_parts_alone_are_far_from_it():
    a, b, want, added = pair(64, 300, 32)
    assert ((a.bfloat16().double() @ b.bfloat16().double() - want).abs() > 2**-9 * added).any()


def test_a_small_product_and_one_without_tensor_cores_are_those_of_f32():
    a, b, *_ = pair(64, 300, 32)
    assert torch.equal(multiply(a, b), a @ b)
    assert torch.equal(multiply(a.T[:, :0], b[:0]), torch.zeros(300, 32))


def test_a_linear_layer_multiplies_by_the_transposed():
    a, b, *_ = pair(64, 300, 32)
    assert torch.equal(linear(a, b.T), torch.nn.functional.linear(a, b.T))


@pytest.mark.parametrize("rows", [products.ROWS, 2 * products.ROWS + 3])
def test_rows_are_split_some_at_a_time(monkeypatch, rows):
    """Torch has no product of bf16 with sums in f32 on a CPU, so that one stands in for it."""
    seen = []

    def stand_in(x, y, out_dtype):
        seen.append(len(x))
        return (x.double() @ y.double()).to(out_dtype)

    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "_has_tensor_cores", lambda device: True)
    monkeypatch.setattr(products.torch, "mm", stand_in)
    a, b, want, added = pair(rows, 4, 3)
    assert ((multiply(a, b).double() - want).abs() <= 2**-14 * added).all()
    assert sum(seen) == rows and max(seen) == products.ROWS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
def test_a_gpu_multiplies_as_its_parts_say():
    a, b, want, added = pair(4096, 4096, 1024, 0.5)
    got = multiply(a.cuda(), b.cuda()).cpu().double()
    assert ((got - want).abs() <= 2**-14 * added).all()
    assert torch.equal(multiply(a.cuda(), b.cuda()).cpu().double(), got)
