"""Blocks of steps: experts that are encoded together."""

from __future__ import annotations

from pathlib import Path

import pytest
from mq_quant.quantize.encode.layer_encoder import LayerEncoder
from mq_quant.quantize.pipeline.build_spec import open_builds
from mq_quant.quantize.pipeline.encoding import Step, in_blocks, in_step
from mq_quant.quantize.pipeline.statistics import NoStatistics
from mq_quant.quantize.pipeline.work_units import work_order
from mq_quant.quantize.spec.places import choose_recipe


def experts_of(blocks: list[tuple[Step, ...]]) -> list[list[tuple[int | None, int | None]]]:
    found = [[(step.unit.layer, step.unit.expert) for step in block] for block in blocks]
    return [block for block in found if block[0][1] is not None]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_blocks_are_experts_of_one_layer_in_order(
    small: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(LayerEncoder, "together", most)
    with open_builds([choose_recipe("mq2", None, str(small))], NoStatistics()) as specs:
        order = work_order(specs[0])
        steps = in_step(order, {0: order})
        blocks = in_blocks({0: specs[0]}, steps)
    assert [step for block in blocks for step in block] == steps
    assert all(len(block) == 1 for block in blocks if block[0].unit.expert is None)
    layers = specs[0].plan.config.num_hidden_layers
    count = specs[0].plan.config.num_local_experts
    want = [
        [(n, e) for e in range(at, min(at + most, count))]
        for n in range(layers)
        for at in range(0, count, most)
    ]
    assert experts_of(blocks) == want


def test_experts_that_other_files_need_too_are_not_in_a_block_with_those_that_they_do_not(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was continued has some experts already."""
    monkeypatch.setattr(LayerEncoder, "together", 100)
    with open_builds([choose_recipe("mq2", None, str(small))], NoStatistics()) as specs:
        order = work_order(specs[0])
        left = [unit for unit in order if not (unit.layer == 0 and unit.expert == 1)]
        blocks = in_blocks({0: specs[0], 1: specs[0]}, in_step(order, {0: order, 1: left}))
    first = [block for block in experts_of(blocks) if block[0][0] == 0]
    assert first == [[(0, 0)], [(0, 1)], [(0, 2)]]


@pytest.mark.parametrize(("files", "most"), [(1, 3), (2, 3), (3, 2), (6, 1)])
def test_many_files_have_smaller_blocks(
    small: Path, monkeypatch: pytest.MonkeyPatch, files: int, most: int
) -> None:
    monkeypatch.setattr(LayerEncoder, "together", 3)
    with open_builds([choose_recipe("mq2", None, str(small))], NoStatistics()) as specs:
        order = work_order(specs[0])
        steps = in_step(order, dict.fromkeys(range(files), order))
        blocks = experts_of(in_blocks(dict.fromkeys(range(files), specs[0]), steps))
    assert max(map(len, blocks)) == most
