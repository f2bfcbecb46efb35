"""Units cover the file exactly once, large tensors are split by rows, and the work order follows the shards."""

from __future__ import annotations

import pytest
import small_model
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.pipeline.work_units import WorkUnit, file_order, shard_by_shard
from mq_quant.quantize.spec.estimates import offline_plan
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.plan import ROW_WEIGHTS, PlannedTensor, plan_tensors
from mq_quant.quantize.spec.recipe import load_tier


@pytest.fixture(scope="module")
def small() -> tuple[PlannedTensor, ...]:
    return plan_tensors(load_tier("mq2"), parse_config(small_model.CONFIG))


def check_cover(tensors: tuple[PlannedTensor, ...], made: tuple[WorkUnit, ...]) -> None:
    at = 0
    for unit in made:
        assert unit.start == at
        at += unit.nbytes
    assert at == tensors[-1].start + tensors[-1].nbytes
    assert sum(unit.weights for unit in made) == sum(t.weights for t in tensors)
    assert len({unit.key for unit in made}) == len(made)


def test_units_cover_the_file_without_holes(small: tuple[PlannedTensor, ...]) -> None:
    made = file_order(small)
    check_cover(small, made)
    assert all(unit.is_last and unit.rows is None for unit in made)
    experts = [unit for unit in made if unit.expert is not None]
    assert [(unit.layer, unit.expert, len(unit.tensors)) for unit in experts] == [
        (layer, expert, 3) for layer in (0, 1) for expert in (0, 1, 2)
    ]


def test_at_full_size_no_unit_holds_more_than_the_row_limit() -> None:
    recipe = load_tier("mq2-lloyd")
    plan = offline_plan(recipe, model_files(recipe.model))
    made = file_order(plan.tensors)
    check_cover(plan.tensors, made)
    split = [unit for unit in made if unit.rows]
    assert {unit.tensors[0].name for unit in split} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(unit.weights <= ROW_WEIGHTS for unit in split)
    assert [unit.is_last for unit in split].count(True) == 2
    low, high = split[0].rows or (0, 0)
    assert split[1].rows == (high, 2 * high - low)


def test_each_layer_is_worked_on_shard_by_shard(small: tuple[PlannedTensor, ...]) -> None:
    made = file_order(small)
    backwards = {t.name: -(t.spec.expert or 0) for t in small if t.spec}
    order = shard_by_shard(made, backwards.__getitem__)
    assert sorted(order, key=lambda unit: unit.start) == list(made)
    experts = [(unit.layer, unit.expert) for unit in order if unit.expert is not None]
    assert experts == [(0, 2), (0, 1), (0, 0), (1, 2), (1, 1), (1, 0)]
    for layer in (0, 1):
        of_layer = [unit for unit in order if unit.layer == layer]
        first = next(i for i, unit in enumerate(of_layer) if unit.expert is not None)
        assert any(unit.is_sidecar for unit in of_layer[:first])
