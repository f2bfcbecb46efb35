"""Choices of a router, laid out so that several experts are computed at once."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.quantize.tune.placement import Placement


@given(st.integers(1, 9), st.integers(1, 3), st.integers(3, 7), st.integers(1, 8), st.integers(0, 1 << 32))
def test_every_choice_has_a_place_of_its_expert(
    tokens: int, count: int, experts: int, together: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(experts)[:count] for _ in range(tokens)])
    placement = Placement.of(torch.from_numpy(ids), experts, together)
    flat, place = ids.flatten(), placement.place.numpy()
    assert len(set(place)) == len(flat)
    owner = np.concatenate([np.repeat(block.experts, block.places) for block in placement.blocks])
    np.testing.assert_array_equal(owner[place], flat)
    used = placement.used.numpy()
    assert used.sum() == len(flat)
    np.testing.assert_array_equal(placement.choice.numpy()[place], np.arange(len(flat)))
    assert sorted(placement.order.tolist()) == list(range(experts))
    taken = [e for block in placement.blocks for e in block.experts]
    assert placement.order.tolist()[: len(taken)] == taken and set(taken) == set(flat)
    counts = np.bincount(flat, minlength=experts)
    for block in placement.blocks:
        assert len(block.experts) <= together
        assert block.places == counts[block.experts[0]] < 2 * counts[list(block.experts)].min()
    if together == 1:
        assert used.all()


def test_an_expert_s_tokens_keep_their_order() -> None:
    placement = Placement.of(torch.tensor([[1], [0], [1], [1], [0]]), 2, 2)
    assert [block.experts for block in placement.blocks] == [(1, 0)]
    assert placement.blocks[0].rows == 6
    assert placement.place.tolist() == [0, 3, 1, 2, 4]


def test_an_expert_of_half_the_tokens_begins_another_block() -> None:
    placement = Placement.of(torch.tensor([[2]] * 6 + [[0]] * 4 + [[1]] * 3), 4, 4)
    assert [(block.experts, block.places) for block in placement.blocks] == [((2, 0), 6), ((1,), 3)]
    assert placement.rows_and_experts() == ([12, 3], [2, 1, 1])
