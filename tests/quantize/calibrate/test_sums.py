"""Sums over the rows of several experts, each with the bits that it has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.quantize.calibrate import sums
from mq_quant.quantize.calibrate.sums import second_moment, second_moments, usable


@given(st.lists(st.integers(0, 23), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 1 << 32))
def test_moments_of_several_have_the_bits_of_each_alone(sizes: list[int], together: int, seed: int) -> None:
    """Of more rows than one chunk has, of none, and with rows that are not finite."""
    random = torch.Generator().manual_seed(seed)
    some = [torch.randn(size, 8, generator=random) for size in sizes]
    for rows in some:
        rows[torch.rand(len(rows), generator=random) < 0.1, 3] = torch.nan
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sums, "CHUNK", 7)
        totals, finite = second_moments(some, together)
        for rows, total, good in zip(some, totals, torch.split(finite, sizes), strict=True):
            assert torch.equal(good[:, 0], rows.isfinite().all(1))
            assert torch.equal(total, second_moment(torch.where(good, rows, 0)))


@pytest.mark.parametrize(("value", "fits"), [(1e19, True), (2e19, False), (-2e19, False), (1.2e19, False)])
def test_a_row_is_usable_while_f32_holds_its_energy(value: float, fits: bool) -> None:
    """Its largest number is 3.4e38; three squares of 1.2e19 are more, and one is not."""
    row = torch.tensor([[0.0, value, 0.0]])
    assert usable(row.repeat(1, 3) if abs(value) == 1.2e19 else row).item() is fits


def test_rows_that_hold_no_number_are_not_usable() -> None:
    rows = torch.zeros(4, 5)
    rows[1, 2], rows[2, 0], rows[3, 4] = torch.nan, torch.inf, -torch.inf
    assert usable(rows)[:, 0].tolist() == [True, False, False, False]
