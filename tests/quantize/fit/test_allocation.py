"""An allocation becomes rules and comes back from them, for any number of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.fit.allocation import Allocation, allocation_of, rules_of
from mq_quant.quantize.fit.measurement import EXPERT_NAMES
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.recipe import load_model, load_tier, parse_recipe, tiers

CONFIG = parse_config(model_files(load_model("minimax-m2.7")).config)
FORMATS = st.sampled_from(EXPERT_NAMES)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(FORMATS, FORMATS), min_size=1, max_size=220))
def test_rules_say_the_allocation(layers: list[tuple[str, str]]) -> None:
    allocation = Allocation(tuple(layers))
    base = load_tier("mq2")
    recipe = base.model_copy(update={"rules": rules_of(allocation, base)})
    config = replace(CONFIG, num_hidden_layers=len(layers))
    assert allocation_of(recipe, config) == allocation
    parse_recipe(recipe.model_dump(mode="json", by_alias=True), "here")  # within the bounds of recipes
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert recipe.format_of(name) == base.format_of(name)


@pytest.mark.parametrize("tier", tiers())
def test_the_same_formats_everywhere_are_the_rules_of_a_tier(tier: str) -> None:
    recipe = load_tier(tier)
    assert rules_of(allocation_of(recipe, CONFIG), load_tier("mq2")) == recipe.rules
