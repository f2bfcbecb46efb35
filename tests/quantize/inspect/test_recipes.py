"""recipes: what is listed is there, what is copied can be built, and nothing is overwritten unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
from mq_quant.formats.errors import OutputError, RecipeError
from mq_quant.quantize.inspect.recipes import copy_recipe, list_recipes, recipe_text
from mq_quant.quantize.spec.recipe import fitted_tiers, load_recipe, load_tier, tiers


def test_a_recipe_that_is_not_there_is_refused_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no tier 'mq5'") as refused:
        recipe_text("mq5")
    assert "mq4" in str(refused.value)
    with pytest.raises(RecipeError, match="no model 'mini'"):
        list_recipes("mini")
    with pytest.raises(RecipeError):
        copy_recipe("mq5", "tiny", tmp_path / "x.yaml")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        copy_recipe("mq2", "tiny", mine)
    assert mine.read_text() == "mine"
    with pytest.raises(OutputError, match="folder does not exist"):
        copy_recipe("mq2", "tiny", tmp_path / "none" / "mine.yaml")
    copy_recipe("mq2", "tiny", mine, force=True)
    assert load_recipe(mine).tier == "mq2"


@pytest.mark.parametrize("model", ["minimax-m2.7", "tiny"])
def test_all_recipes_are_listed_and_their_copies_say_the_same(model: str, tmp_path: Path) -> None:
    listed = list_recipes(model)
    assert [line.tier for line in listed.recipes] == tiers(model) + fitted_tiers(model)
    assert {line.model for line in listed.models} >= {"minimax-m2.7", "tiny"}
    for line in listed.recipes:
        path = tmp_path / f"{line.tier}.yaml"
        assert copy_recipe(line.tier, model, path).text == path.read_text()
        assert load_recipe(path) == load_tier(line.tier, model).model_copy(update={"quantization_hash": None})
        assert "\nschema: 1\n" in "\n" + recipe_text(line.tier, model).text


def test_a_model_that_is_not_there_is_refused_with_those_that_are() -> None:
    for read in (lambda: list_recipes("none"), lambda: recipe_text("mq2", "../none")):
        with pytest.raises(RecipeError, match=r"there is no model '[^']*none'\n  There are .*tiny"):
            read()
