"""Sizes counted by kind are those of the plan that lists every tensor; bad recipes are refused in the same words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.errors import MqError
from mq_quant.formats.hfq.totals import by_format
from mq_quant.formats.minimax import normalize_config, parse_config
from mq_quant.quantize.spec.estimates import offline_plan
from mq_quant.quantize.spec.metadata import SideFiles
from mq_quant.quantize.spec.places import ModelFiles, model_files
from mq_quant.quantize.spec.recipe import Recipe, Rule, load_tier, models, tiers
from mq_quant.quantize.spec.tally import file_sizes

CONFIG: dict[str, Any] = {
    "model_type": "minimax_m2",
    "vocab_size": 64,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 1e4,
    "intermediate_size": 256,
    "num_local_experts": 11,
    "num_experts_per_tok": 2,
}


def with_rules(*rules: tuple[str, str]) -> Recipe:
    recipe = load_tier("mq4")
    first = tuple(Rule(tensors=tensors, format=fmt) for tensors, fmt in rules)
    return recipe.model_copy(update={"rules": (*first, *recipe.rules)})


def files(**changes: Any) -> ModelFiles:
    side = SideFiles(tokenizer="{}", tokenizer_config={"é": "\u2028"}, chat_template="{{ x }}")
    return ModelFiles(normalize_config({**CONFIG, **changes}), side, True)


def assert_same(recipe: Recipe, model: ModelFiles) -> None:
    """Either the same sizes, or the same error."""
    try:
        plan = offline_plan(recipe, model)
    except MqError as e:
        with pytest.raises(type(e)) as caught:
            file_sizes(recipe, model, parse_config(model.config))
        assert str(caught.value) == str(e)
        return
    sizes = file_sizes(recipe, model, parse_config(model.config))
    assert sizes.total_bytes == plan.total_bytes
    assert sizes.payload_bytes == plan.payload_bytes
    assert sizes.metadata_bytes == plan.metadata_bytes
    assert sizes.tensor_count == len(plan.tensors)
    assert sizes.largest == max(t.weights for t in plan.tensors)
    assert list(sizes.by_format.items()) == list(by_format(t.meta() for t in plan.tensors).items())


@pytest.mark.parametrize(
    ("model", "tier"), [(model, tier) for model in models() for tier in tiers(model)][::3]
)
def test_bundled_tiers(model: str, tier: str) -> None:
    recipe = load_tier(tier, model)
    assert_same(recipe, model_files(recipe.model))


NAMES = (
    "norm", "gate", "e_score", "w1", "w2", "w3", r"w[13]", "embed", "lm_head", "q_proj", r"layers\.1\.", r"layers\.1",
    r"experts\.3\.", r"experts\.\d+\.w2", r"layers\.[0-5]\..*w2", r"layers\.11\..*experts\.\d+\.w[13]", "nothing",
)  # fmt: skip
FORMATS = ("F16", "F32", "Q8F16", "MQ4", "MQ6", "MQ2-Lloyd", "MQ3-Lloyd")


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(FORMATS)), max_size=3))
@settings(max_examples=60)
def test_any_rules(rules: list[tuple[str, str]]) -> None:
    assert_same(with_rules(*rules), files())


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 384}, {"intermediate_size": 128}, {"intermediate_size": 512}, {"num_hidden_layers": 1}],
)
def test_other_shapes(changes: dict[str, int]) -> None:
    """One of them has equal shapes of gate, up and down, which are still told apart."""
    assert_same(load_tier("mq2-lloyd"), files(**changes))


def test_a_rule_may_single_out_layers() -> None:
    recipe = with_rules((r"layers\.(3|10)\..*w2", "MQ6"))
    assert_same(recipe, files())
    assert file_sizes(recipe, files(), parse_config(CONFIG)).by_format["MQ6"].tensors == 2 * 11


def test_a_tensor_that_no_rule_takes_is_named() -> None:
    recipe = load_tier("mq4").model_copy(update={"rules": (Rule(tensors="layers", format="MQ4"),)})
    assert_same(recipe, files())
