"""Values and gradients of levels, beside plain numpy, for numbers of groups that no block divides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mq_quant.kernels.train.levels import level_gradients, spread_levels

HEADS = [(4, False), (8, False), (16, False), (2, True)]
LEVELS_OF_GRIDS = 64
CHOSEN = np.array([3, 0], np.int32)
"""Of four matrices, in an order of their own."""
shapes = pytest.mark.parametrize("groups", [1, 8, 27])
heads_of = pytest.mark.parametrize(("count", "even"), HEADS)
halves = pytest.mark.parametrize("half", [False, True], ids=["f32", "bf16"])


def random_groups(rng, groups, count, even):
    heads = rng.standard_normal((len(CHOSEN), groups, count)).astype(np.float32)
    return heads, rng.integers(0, LEVELS_OF_GRIDS if even else count, (4, groups, 256)).astype(np.uint8)


def as_bf16(values):
    """Values f32 as bf16, the bits u16, by torch."""
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


@shapes
@heads_of
@halves
def test_values_are_those_of_the_codes(backend, rng, groups, count, even, half):
    heads, codes = random_groups(rng, groups, count, even)
    values = backend.alloc((len(CHOSEN), groups, 256), np.uint16 if half else np.float32)
    given = (backend.upload(codes), backend.upload(heads), backend.upload(CHOSEN))
    spread_levels(backend, values, *given, even)
    mine = codes[CHOSEN]
    chosen = np.take_along_axis(heads, mine.astype(int) % count, 2)
    want = heads[..., 1:2] + heads[..., :1] * mine.astype(np.float32) if even else chosen
    np.testing.assert_array_equal(backend.download(values), as_bf16(want) if half else want)


def test_bf16_rounds_ties_to_even_and_keeps_what_is_no_number(backend):
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.nan, np.inf, -np.inf, 3.4e38, -0.0, 1e-40], np.float32)
    heads = np.resize(ties, (1, 1, 8))
    codes = np.resize(np.arange(8, dtype=np.uint8), (1, 1, 256))
    values = backend.alloc((1, 1, 256), np.uint16)
    given = (backend.upload(codes), backend.upload(heads), backend.upload(np.zeros(1, np.int32)))
    spread_levels(backend, values, *given, False)
    got = backend.download(values).reshape(-1, 8)[0]
    number = ~np.isnan(ties)
    np.testing.assert_array_equal(got[number], as_bf16(ties)[number])
    assert np.isnan((got.astype(np.uint32) << 16).view(np.float32)[~number]).all()


@shapes
@heads_of
@halves
def test_gradients_are_sums_over_the_values_of_a_level(backend, rng, groups, count, even, half):
    _, codes = random_groups(rng, groups, count, even)
    gradients = rng.standard_normal((len(CHOSEN), groups, 256)).astype(np.float32)
    out = backend.alloc((len(CHOSEN), groups, count), np.float32)
    stored = as_bf16(gradients) if half else gradients
    given = (backend.upload(stored), backend.upload(codes), backend.upload(CHOSEN))
    level_gradients(backend, out, *given, even)
    exact = (stored.astype(np.uint32) << 16).view(np.float32) if half else gradients
    wide, mine = exact.astype(np.float64), codes[CHOSEN]
    if even:
        want = np.stack([(wide * mine).sum(-1), wide.sum(-1)], -1)
    else:
        want = np.stack([np.where(mine == k, wide, 0).sum(-1) for k in range(count)], -1)
    np.testing.assert_allclose(backend.download(out), want, rtol=1e-5, atol=1e-4 * (30 if even else 1))
