"""What is changed in a recipe for one build is checked like the recipe itself."""

from __future__ import annotations

import math

import pytest
from mq_quant.formats.errors import RecipeError
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.spec.recipe import load_tier


@pytest.mark.parametrize("alpha", [-0.1, 2.1, 1e300, math.inf, math.nan])
def test_an_exponent_out_of_range_is_refused_wherever_it_comes_from(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"awq\.alpha: is .*, not an exponent from 0 to 2"):
        RecipeChanges(alpha=alpha).apply(load_tier("mq2"))


@pytest.mark.parametrize("alpha", [0, 0.55, 2])
def test_an_exponent_in_range_replaces_the_recipes_own(alpha: float) -> None:
    recipe = load_tier("mq2")
    changed = RecipeChanges(alpha=alpha).apply(recipe)
    assert changed.awq.alpha == alpha and changed.awq.fold_down == recipe.awq.fold_down
    assert RecipeChanges().apply(recipe) == recipe
