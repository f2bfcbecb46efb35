"""Recipes: what the schema refuses and how it says so, and that every bundled recipe is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
from mq_quant.formats.errors import RecipeError
from mq_quant.quantize.spec.recipe import load_recipe, load_tier, parse_recipe, tiers

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
        (("model: tiny", "model: tiny\nawq: {alpha: .nan}"), "'.nan' is no finite number in line 6"),
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


def aliased(times: int) -> str:
    """A recipe whose `config` repeats a list of nine nine times, that again nine times, and so on."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, times)]
    model = "model: {name: x, source: {folder: x}, config: {" + ", ".join(lines) + "}}"
    return GOOD.replace("model: tiny", model)


TOO_MUCH = {
    "eighty thousand keys": "".join(f"k{i:05d}: 1\n" for i in range(80_000)),
    "ten thousand keys": "".join(f"k{i:05d}: 1\n" for i in range(10_000)),
    "deep lists": "a: " + "[" * 99 + "]" * 99,
    "brackets that nobody closes": "[{" * 100_000,
    "deep mappings": "".join(" " * i + "a:\n" for i in range(99)),
    "aliases that multiply": aliased(9),
    "merges that multiply": "a0: &a0 {x: 1, y: 2}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
    "an alias in itself": "a: &a [*a]",
    "many rules": GOOD + "  - {tensors: x, format: MQ4}\n" * 300,
    "a long tier": GOOD.replace("tier: mine", f"tier: {'m' * 1000}"),
    "a number of thousands of digits": GOOD.replace("schema: 1", f"schema: {'1' * 5000}"),
    "a number of base sixty": GOOD.replace("schema: 1", f"schema: {'1:' * 30_000}1"),
    "infinity": GOOD.replace("schema: 1", "schema: .inf"),
    "a date": GOOD.replace("A tier for tests.", "2001-01-01"),
    "bytes": GOOD.replace("A tier for tests.", "!!binary aGk="),
    "half a character": GOOD.replace("A tier for tests.", '"\\ud800"'),
    "a key that is no text": GOOD + "yes: 1\n",
    "a number in the config": GOOD.replace(
        "model: tiny", "model: {name: x, source: {folder: x}, config: {a: 1.0e+999}}"
    ),
    "a name that leads elsewhere": GOOD.replace("model: tiny", "model: {name: ../x, source: {folder: x}}"),
    "steering characters": GOOD + '"k\\e[2J": 1\n',
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_is_beyond_a_recipe_is_one_short_error(case: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine\.yaml") as caught:
        load_recipe(write(tmp_path, TOO_MUCH[case]))
    assert len(str(caught.value)) < 1000 and str(caught.value).replace("\n", "").isprintable()


def test_a_document_of_a_strangers_file_has_the_same_bounds() -> None:
    """Where it comes as JSON, no YAML is read that could refuse it."""
    good = load_tier("mq4").resolved()
    assert parse_recipe(good, "x.mq4").tier == "mq4"
    for change in ({f"k{i}": 1 for i in range(20_000)}, {"more": [[0] * 200] * 100}):
        with pytest.raises(RecipeError, match=r"x\.mq4: holds more than"):
            parse_recipe(good | change, "x.mq4")


def test_anchors_and_merges_are_usual_yaml(tmp_path: Path) -> None:
    text = (
        GOOD.replace("- {tensors: 'w2'", "- &down {tensors: 'w2'")
        + "  - {<<: *down, tensors: w3}\n  - *down\n"
    )
    rules = load_recipe(write(tmp_path, text)).rules
    assert [(rule.tensors, rule.format) for rule in rules[2:]] == [("w3", "MQ4"), ("w2", "MQ4")]
    assert load_recipe(write(tmp_path, aliased(3))).model.config is not None


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
    for model in ("minimax-m2.7", "tiny"):
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
