"""Trained values as a file stores them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.blocks import MQ2_LLOYD, MQ3_LLOYD, MQ4, MQ6, AffineFormat
from mq_quant.quantize.tune.rounding import ascending, with_heads, within_f16, within_scales


@given(
    st.lists(st.tuples(st.floats(-10, 10, width=16), st.booleans()), min_size=4, max_size=4).filter(
        lambda group: any(used for _, used in group)
    )
)
def test_levels_become_ascending_and_those_in_order_stay(group: list[tuple[float, bool]]) -> None:
    levels = np.array([[level for level, _ in group]], np.float32)
    used = np.array([[used for _, used in group]])
    out = ascending(levels, used)
    assert (np.diff(out) >= 0).all()
    if (np.diff(levels[used]) >= 0).all():  # levels that no code uses give way
        np.testing.assert_array_equal(out[used], levels[used])
    assert levels.min() <= out.min() <= out.max() <= levels.max()


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ3_LLOYD], ids=lambda fmt: fmt.name)
def test_a_codebook_is_f16_ascending_finite_and_its_codes_stay(fmt: type[MQ2_LLOYD]) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, fmt.levels, (5, 256), np.uint8)
    codes[4] = 1  # a group of one level
    payload = fmt.pack(
        np.sort(random.normal(size=(5, fmt.levels)), axis=1).astype(np.float16), codes
    ).reshape(-1)
    heads = np.sort(random.normal(size=(5, fmt.levels)), axis=1).astype(np.float32)
    heads[1, :2] = heads[1, 1::-1]
    heads[2, -1] = 1e6
    heads[3] = 0
    out = with_heads(fmt, payload, heads)
    levels, kept = fmt.unpack(out)
    np.testing.assert_array_equal(kept, codes)
    assert (
        out.shape == payload.shape
        and np.isfinite(levels).all()
        and (np.diff(levels.astype(np.float32)) >= 0).all()
    )
    np.testing.assert_array_equal(levels[0], heads[0].astype(np.float16))
    assert levels[2, -1] == 65504
    np.testing.assert_allclose(levels[1, :2].astype(np.float32), heads[1, :2].mean(), rtol=2e-3)


@pytest.mark.parametrize("fmt", [MQ4, MQ6], ids=lambda fmt: fmt.name)
def test_a_grid_keeps_scale_and_zero_in_f32(fmt: AffineFormat) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, fmt.levels, (5, 256), np.uint8)
    scale, zero = random.random((2, 5)).astype(np.float32)
    payload = fmt.pack(scale, zero, codes).reshape(-1)
    new = random.random((5, 2)).astype(np.float32)
    got = fmt.unpack(with_heads(fmt, payload, new))
    for part, expected in zip(got, (new[:, 0], new[:, 1], codes), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_scales_stay_positive_and_norms_finite() -> None:
    odd = np.array([-1, 0, 1e-9, 1, 1e9], np.float32)
    for values in (within_scales(odd), within_f16(odd)):
        assert np.isfinite(values.astype(np.float16)).all()
    assert (within_scales(odd).astype(np.float16) > 0).all()
