"""The simulation of a cluster, small: more workers are not slower, nothing is faster than what it is bound by."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from mq_quant.quantize.pipeline.work_units import file_order
from mq_quant.quantize.spec.estimates import offline_plan, source_bytes
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.recipe import load_tier

PATH = Path(__file__).parents[2] / "benchmarks" / "cluster_model.py"


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_model", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster_model"] = module
    spec.loader.exec_module(module)
    return module


def test_nodes_help_until_a_line_is_full(model: ModuleType) -> None:
    recipe = load_tier("mq3")
    plan = offline_plan(recipe, model_files(recipe.model))
    order = file_order(plan.tensors)
    for case in model.CASES:
        runs = model.results(plan, order, replace(case, counts=(1, 4)))
        assert runs[4].seconds < runs[1].seconds
        for count, run in runs.items():
            site = case.site(plan, count)
            assert run.read >= 0.99 * source_bytes(plan.config)
            assert run.seconds >= run.read / min(site.source_line, count * site.node_line)
        assert "| 4 |" in model.table({case.name: runs})


def test_a_slow_node_is_overtaken(model: ModuleType) -> None:
    tasks = [model.Task(model.Slice(str(n), ((str(n), n),), 1), 100.0, 1.0, 1.0) for n in range(64)]
    workers = [model.Worker(n, 1.0) for n in range(8)]
    workers[7] = replace(workers[7], speed=0.05)
    site = model.Site(8, 1, 1.0)
    whole = model.simulate(site, tasks, workers)
    assert whole.twice == 1
    assert whole.seconds < 100 * 64 / 7 + 3 * 100 + model.OPENS / 0.05
