"""Values and gradients of levels, beside plain numpy, for numbers of groups that no block divides."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.kernels.train.levels import level_gradients, spread_levels

HEADS = [(4, False), (8, False), (16, False), (2, True)]
LEVELS_OF_GRIDS = 64


def random_groups(rng, groups, count, even):
    heads = rng.standard_normal((groups, count)).astype(np.float32)
    return heads, rng.integers(0, LEVELS_OF_GRIDS if even else count, (groups, 256)).astype(np.uint8)


@pytest.mark.parametrize("groups", [1, 8, 27])
@pytest.mark.parametrize(("count", "even"), HEADS)
def test_values_are_those_of_the_codes(backend, rng, groups, count, even):
    heads, codes = random_groups(rng, groups, count, even)
    values = backend.alloc((groups, 256), np.float32)
    spread_levels(backend, values, backend.upload(codes), backend.upload(heads), even)
    chosen = np.take_along_axis(heads, codes.astype(int) % count, 1)
    want = heads[:, 1:2] + heads[:, :1] * codes.astype(np.float32) if even else chosen
    np.testing.assert_array_equal(backend.download(values), want)


@pytest.mark.parametrize("groups", [1, 8, 27])
@pytest.mark.parametrize(("count", "even"), HEADS)
def test_gradients_are_sums_over_the_values_of_a_level(backend, rng, groups, count, even):
    _, codes = random_groups(rng, groups, count, even)
    gradients = rng.standard_normal((groups, 256)).astype(np.float32)
    out = backend.alloc((groups, count), np.float32)
    level_gradients(backend, out, backend.upload(gradients), backend.upload(codes), even)
    wide = gradients.astype(np.float64)
    if even:
        want = np.stack([(wide * codes).sum(1), wide.sum(1)], 1)
    else:
        want = np.stack([np.where(codes == k, wide, 0).sum(1) for k in range(count)], 1)
    np.testing.assert_allclose(backend.download(out), want, rtol=1e-5, atol=1e-4 * (30 if even else 1))
