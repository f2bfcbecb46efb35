"""Products on tensor cores: how near they come to those of f32, and when f32 is multiplied."""

from __future__ import annotations

import pytest
import torch
from mq_quant.verify.model import products
from mq_quant.verify.model.products import in_parts, inner, linear

SHAPES = [(3, 7, 5), (64, 300, 32), (1, 1, 1)]
NEAR = 2**-14


def pair(m, k, n, spread=1.0):
    """Matrices f32 [m, k] and [n, k] whose values have very different sizes, with the product of the first and the
    other one transposed in f64, and what it adds up in all.
    """
    of = torch.Generator().manual_seed(m + k)
    a, b = (
        torch.randn(shape, generator=of) * 10 ** (spread * torch.randn(shape, generator=of))
        for shape in ((m, k), (n, k))
    )
    return a, b, a.double() @ b.double().T, a.double().abs() @ b.double().abs().T


@pytest.fixture
def tensor_cores(monkeypatch):
    """Has every product split; torch has no product of bf16 with sums in f32 on a CPU: another one stands in."""
    asked = []

    def stand_in(a, b, out_dtype):
        assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        asked.append(a.shape)
        return (a.double() @ b.double()).to(out_dtype)

    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "_has_tensor_cores", lambda device: True)
    monkeypatch.setattr(products.torch, "mm", stand_in)
    return asked


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_parts_have_the_product_of_the_whole(tensor_cores, shape, spread):
    a, b, want, added = pair(*shape, spread)
    (m, k, _), near = shape, NEAR * added
    assert ((linear(a, b) - want).abs() <= near).all()
    assert ((inner(a.T.contiguous(), b.T.contiguous()) - want).abs() <= near).all()
    assert tensor_cores == [(m, 3 * k)] * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_tensor_twice_is_split_once_into_the_parts_of_two(tensor_cores, monkeypatch, shape):
    x, split = pair(*shape)[0].T.contiguous(), []

    def counted(values, *args, **kwargs):
        split.append(values)
        return in_parts(values, *args, **kwargs)

    monkeypatch.setattr(products, "in_parts", counted)
    monkeypatch.setattr(products, "_on_tensor_cores", lambda a, b: (a, b))
    once, twice = inner(x, x), inner(x, x.clone())
    assert len(split) == 1 + 2
    for got, want in zip(once, twice, strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_high_parts_alone_are_far_from_it():
    a, b, want, added = pair(64, 300, 32)
    assert ((a.bfloat16().double() @ b.bfloat16().double().T - want).abs() > 2**-9 * added).any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("low", [1, 2])
def test_parts_are_the_value_rounded_and_what_is_left_of_it(axis, low):
    value = torch.tensor([[1 + 2**-9, -3.0], [1e30, 7e-20]])
    parts = in_parts(value, axis, low).chunk(3, axis)
    assert all(torch.equal(parts[place], value.bfloat16()) for place in {0, 1, 2} - {low})
    assert torch.equal(parts[low], (value - value.bfloat16()).bfloat16())


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(tensor_cores, wrong):
    a, b, *_ = pair(3, 7, 5)
    a[1, 2] = wrong
    assert linear(a, b).isfinite().all(1).tolist() == [True, False, True]


def test_a_small_product_and_one_without_tensor_cores_are_those_of_f32():
    a, b, *_ = pair(64, 300, 32)
    assert torch.equal(linear(a, b), torch.nn.functional.linear(a, b))
    assert torch.equal(inner(a.T, b.T), a @ b.T)
    assert torch.equal(linear(a[:, :0], b[:, :0]), torch.zeros(64, 32))


@pytest.mark.parametrize("rows", [products.ROWS, 2 * products.ROWS + 3])
def test_rows_are_split_some_at_a_time(tensor_cores, rows):
    a, b, want, added = pair(rows, 4, 3)
    assert ((linear(a, b) - want).abs() <= NEAR * added).all()
    seen = [shape[0] for shape in tensor_cores]
    assert sum(seen) == rows and max(seen) == products.ROWS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
def test_a_gpu_multiplies_as_its_parts_say():
    a, b, want, added = pair(4096, 4096, 4096, 0.5)
    for got in (linear(a.cuda(), b.cuda()), inner(a.T.cuda(), b.T.cuda())):
        assert ((got.cpu() - want).abs() <= NEAR * added).all()
    assert torch.equal(linear(a.cuda(), b.cuda()), linear(a.cuda(), b.cuda()))
    x = a.T.contiguous().cuda()
    assert torch.equal(inner(x, x), inner(x, x.clone()))
