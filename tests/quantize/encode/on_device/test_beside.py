"""Matrices side by side: what is put together comes apart again, and is rounded as each alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.blocks import MQ2_LLOYD, MQ4
from mq_quant.kernels.encode.device_encoder import DeviceEncoder
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.lloyd.hessian.row import from_weights
from mq_quant.quantize.encode.encoders import CPU
from mq_quant.quantize.encode.on_device.beside import apart, are_alike, beside, each
from mq_quant.quantize.encode.on_device.factors import Factors, factors_of
from mq_quant.quantize.encode.on_device.rounding import Rounder, Streamed, ThroughMemory, Under


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_what_is_put_side_by_side_comes_apart_again(count, groups, rows):
    given = torch.randn(count, rows, 256 * groups)
    assert torch.equal(apart(beside(given), count, groups), given)
    vectors = given[:, 0]
    assert torch.equal(apart(beside(vectors)[None], count, groups)[:, 0], vectors)


def factors(width, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * width, width)) * rng.uniform(0.5, 2, width)
    return factors_of(torch.from_numpy(x.T @ x / len(x)))


def white(width):
    return from_weights(np.ones(width))


def test_only_matrices_with_factors_of_one_shape_go_side_by_side():
    two, three = factors(512, 0), factors(768, 0)
    assert are_alike([two, factors(512, 1)])
    assert not are_alike([two, three])
    assert not are_alike([two, white(512)])
    assert not are_alike([white(512), white(512)])


def rounded(rounder: Rounder, matrices, fmt, under):
    payloads, values = rounder.encode(matrices, fmt, under, 0.9)
    return rounder.fetch(payloads), values


@pytest.mark.parametrize("kind", ["alike", "one is white"])
@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ4], ids=lambda f: f.name)
def test_rounding_side_by_side_gives_the_bytes_of_each_alone(fmt, kind):
    matrices = torch.randn(3, 20, 512, generator=torch.Generator().manual_seed(0))
    hessians = [factors(512, n) for n in range(3)]
    assert all(isinstance(h, Factors) for h in hessians)
    if kind != "alike":
        hessians[1] = white(512)
    under = [Under(torch.full((512,), s), h) for s, h in zip((1.0, 2.0, 0.5), hessians, strict=True)]
    alone = [rounded(ThroughMemory(CPU), m[None], fmt, [u]) for m, u in zip(matrices, under, strict=True)]
    wanted, meant = np.concatenate([p for p, _ in alone]), torch.cat([v for _, v in alone])
    with open_backend("cpu") as backend:
        streamed = Streamed(DeviceEncoder(backend))
        together = [rounded(streamed, matrices, fmt, under) for _ in range(3)]
    for payloads, values in (*together, rounded(ThroughMemory(CPU), matrices, fmt, under)):
        np.testing.assert_array_equal(payloads, wanted)
        assert torch.equal(values, meant)


@pytest.mark.parametrize("kind", ["alike", "one is white"])
def test_rows_of_matrices_side_by_side_answer_as_those_of_each_alone(kind):
    matrices = torch.randn(3, 48, 512, generator=torch.Generator().manual_seed(0))
    hessians = [factors(512, n) for n in range(3)]
    if kind != "alike":
        hessians[1] = white(512)
    under = [Under(torch.full((512,), s), h) for s, h in zip((1.0, 2.0, 0.5), hessians, strict=True)]
    answers = tuple(
        (slice(n, n + 16), torch.randn(16, n, generator=torch.Generator().manual_seed(n)) / 16)
        for n in (0, 16, 32)
    )
    pairs = list(zip(matrices, under, strict=True))
    memory = ThroughMemory(CPU)
    wanted = torch.cat([memory.payloads(m[None], MQ2_LLOYD, [u], 0.9, answers) for m, u in pairs])
    assert not torch.equal(wanted, memory.payloads(matrices, MQ2_LLOYD, under, 0.9, None))
    with open_backend("cpu") as backend:
        streamed = Streamed(DeviceEncoder(backend))
        for _ in range(3):
            assert torch.equal(streamed.payloads(matrices, MQ2_LLOYD, under, 0.9, answers), wanted)


def test_a_product_of_each_does_not_depend_on_those_beside_it():
    given, share = torch.randn(3, 40, 512), torch.randn(24, 40)
    found = each(partial(torch.mm, share), given, torch.empty(3, 24, 512))
    assert all(torch.equal(a, torch.mm(share, b)) for a, b in zip(found, given, strict=True))
