"""Recipes: what the schema refuses and how it says so, and that every bundled recipe is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
from mq_quant.formats.errors import RecipeError
from mq_quant.quantize.spec.recipe import load_recipe, load_tier, models, tiers

TIERS = ["mq2", "mq2-lloyd", "mq2-mini", "mq3", "mq3-lloyd", "mq4"]
GOOD = """
schema: 1
tier: mine
description: A tier for tests.
model: tiny
rules:
  - {tensors: 'w2', format: MQ4}
  - {tensors: '.*', format: Q8F16}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("schema: 1", "schema: 2"), "schema"),
        (("schema: 1", ""), "schema"),
        (("tier: mine", "teir: mine"), "unknown key teir; did you mean 'tier'?"),
        (("tier: mine", "tier: ../mine"), "tier"),
        (("format: MQ4", "format: MQ5"), "is not a block format"),
        (("format: MQ4", "formt: MQ4"), "did you mean 'format'?"),
        (("'w2'", "'w2('"), "is not a regular expression"),
        (("model: tiny", "model: huge"), "no model 'huge'"),
        (("model: tiny", "model: {name: x}"), "model.source"),
        (("model: tiny", "model: tiny\nmodel: tiny"), "'model' twice"),
        (("model: tiny", "model: tiny\nfit: best"), "fit"),
        (("model: tiny", "model: tiny\ngain: 'yes'"), "gain"),
        (("model: tiny", "model: tiny\nverify: {cosine_mean: 2}"), "cosine_mean"),
        (("model: tiny", "model: tiny\nawq: {alfa: 1.0}"), "did you mean 'alpha'?"),
        (
            ("model: tiny", "model: tiny\nawq: {alpha: 2.01}"),
            "awq.alpha: is 2.01, not an exponent from 0 to 2",
        ),
        (("model: tiny", "model: tiny\nawq: {alpha: -0.1}"), "awq.alpha: is -0.1, not"),
        (("model: tiny", "model: tiny\nawq: {alpha: .nan}"), "awq.alpha: is nan, not"),
        (
            ("model: tiny", "model: {name: x, place: {folder: x}}"),
            "model.source: Field required; unknown key model.place",
        ),
        (("model: tiny", "model: !!python/object/apply:os.system ['false']"), "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD.replace(*change)))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "- a", "a: [", "x" * (1 << 21), "[" * 100_000, "a: !!timestamp 99", "{[a]: 1}"]
)
def test_what_is_no_recipe_at_all_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_rules_apply_in_order_and_must_cover(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.format_of("a.w2.weight").name == "MQ4"
    assert recipe.format_of("a.w1.weight").name == "Q8F16"
    partial = load_recipe(write(tmp_path, GOOD.replace("'.*'", "'w1'")))
    with pytest.raises(RecipeError, match=r"no rule of the recipe for mine matches[\s\S]*end the rules"):
        partial.format_of("lm_head.weight")


def test_every_bundled_recipe_is_valid_and_named_as_its_file() -> None:
    assert models() == ["minimax-m2.7", "tiny"]
    for model in models():
        assert tiers(model) == TIERS
        for tier in TIERS:
            assert load_tier(tier, model).tier == tier


def test_both_models_give_a_tier_the_same_formats() -> None:
    for tier in TIERS:
        real, tiny = load_tier(tier), load_tier(tier, "tiny")
        assert (real.rules, real.fit, real.gain, real.awq) == (tiny.rules, tiny.fit, tiny.gain, tiny.awq)


def test_an_unknown_tier_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean 'mq3-lloyd'"):
        load_tier("mq3-loyd")


def test_the_resolved_recipe_is_a_recipe_again(tmp_path: Path) -> None:
    import yaml

    recipe = load_tier("mq2-lloyd")
    again = load_recipe(write(tmp_path, yaml.safe_dump(recipe.resolved())))
    assert again.resolved() == recipe.resolved()
