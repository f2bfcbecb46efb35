"""A spec: what decides a file's bytes is resolved and named, and nothing stays open where that fails."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats.errors import CheckpointError, ImatrixError, OutputError, RecipeError
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges, open_builds
from mq_quant.quantize.pipeline.statistics import (
    ImatrixFile,
    MomentFolder,
    NoStatistics,
    Statistics,
)
from mq_quant.quantize.spec import places
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.spec.recipe import ImatrixRef, Recipe, load_tier, parse_recipe


@pytest.fixture
def recipe(small: Path) -> Recipe:
    return choose_recipe("mq2", None, str(small))


class Broken:
    """A source that does not pass its check."""

    def __init__(self) -> None:
        self.closed = False

    def validate(self) -> None:
        raise CheckpointError("is broken")

    def close(self) -> None:
        self.closed = True


def test_a_source_that_does_not_pass_its_check_is_closed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Broken()
    monkeypatch.setattr(places, "open_place", lambda *_: source)
    with pytest.raises(CheckpointError, match="is broken"), open_builds([recipe]):
        pass
    assert source.closed


def test_a_source_is_closed_after_any_later_error(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    real = places.open_place

    def watched(*arguments: Any) -> Any:
        source = real(*arguments)
        monkeypatch.setattr(source, "close", lambda: closed.append(True))
        return source

    monkeypatch.setattr(places, "open_place", watched)
    with pytest.raises(ImatrixError), open_builds([recipe], ImatrixFile(tmp_path / "none")):
        pass
    assert closed == [True]


def test_an_imatrix_that_is_not_the_pinned_one_is_refused(recipe: Recipe, small: Path) -> None:
    def pinned(sha256: str) -> Recipe:
        ref = ImatrixRef(file="imatrix.gguf", sha256=sha256)
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"imatrix": ref})})

    stated = hashlib.sha256((small / "imatrix.gguf").read_bytes()).hexdigest()
    with pytest.raises(ImatrixError, match="pins the imatrix"), open_builds([pinned("0" * 64)]):
        pass
    with open_builds([pinned("0" * 64)], ImatrixFile(small / "imatrix.gguf")):
        """Another one that is given on purpose is taken."""
    with (
        open_builds([pinned(stated)]) as (spec,),
        open_builds([recipe], ImatrixFile(small / "imatrix.gguf")) as (plain,),
    ):
        assert spec.plan.digest() == plain.plan.digest()
        assert "sha256" not in spec.recipe.resolved()["model"]["imatrix"]
    with pytest.raises(RecipeError, match="sha256"):
        parse_recipe(
            {
                **recipe.resolved(),
                "model": {"name": "x", "source": {"folder": "x"}, "imatrix": {"file": "i", "sha256": "abc"}},
            },
            "x",
        )


def test_the_signature_names_arguments_inputs_and_the_code(recipe: Recipe, small: Path) -> None:
    with open_builds([recipe], ImatrixFile(small / "imatrix.gguf")) as (spec,):
        keys = set(spec.signature)
    assert {"recipe.tier", "recipe.fit", "recipe.awq.alpha", "plan", "program", "imatrix.sha256"} <= keys
    assert {"code.sources", "code.numpy", "code.numba", "code.scipy"} <= keys
    assert {"source.origin.folder", "source.files.config.json.sha256"} <= keys
    assert not [key for key in keys if key.startswith("config")], "what follows from an input is not repeated"


@pytest.mark.parametrize(
    ("statistics", "changes", "expected"),
    [
        (None, RecipeChanges(), ("hessian", True, "search")),
        (None, RecipeChanges("exact", False, 0.5), ("exact", False, 0.5)),
        (NoStatistics(), RecipeChanges(), ("exact", True, 0.0)),
        (NoStatistics(), RecipeChanges("reference"), ("reference", True, 0.0)),
        (NoStatistics(), RecipeChanges(alpha=0.0), ("exact", True, 0.0)),
        (MomentFolder(Path("calib")), RecipeChanges(gain=False), ("hessian", False, "search")),
    ],
)
def test_changes_and_statistics_decide_the_recipe_that_is_built(
    statistics: Statistics | None, changes: RecipeChanges, expected: tuple[Any, ...], recipe: Recipe
) -> None:
    made = changes.apply(recipe, statistics)
    assert (made.fit, made.gain, made.awq.alpha) == expected
    if isinstance(statistics, NoStatistics):
        assert made.awq.fold_down == 0


@pytest.mark.parametrize("changes", [RecipeChanges("hessian"), RecipeChanges(alpha=0.5)])
def test_a_plain_build_refuses_what_needs_statistics(changes: RecipeChanges, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="need statistics"):
        changes.apply(recipe, NoStatistics())


def test_an_output_that_cannot_be_is_refused_before_the_source_is_opened(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "open_place", lambda *_: pytest.fail("the source was opened"))
    (tmp_path / "there").write_bytes(b"precious")
    for name, problem in (
        ("there", "exists already"),
        ("no/folder", "its folder does not exist"),
        ("x" * 250, "too long"),
        (".", "is a folder"),
    ):
        with pytest.raises(OutputError, match=problem):
            build_file(recipe, NoStatistics(), RunOptions(tmp_path / name))


@pytest.mark.parametrize("alpha", [-0.1, 2.1, 1e300, math.inf, math.nan])
def test_an_exponent_out_of_range_is_refused_wherever_it_comes_from(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"awq\.alpha: is .*, not an exponent from 0 to 2"):
        RecipeChanges(alpha=alpha).apply(load_tier("mq2"))


@pytest.mark.parametrize("alpha", [0, 0.55, 2])
def test_an_exponent_in_range_replaces_the_recipes_own(alpha: float) -> None:
    recipe = load_tier("mq2")
    changed = RecipeChanges(alpha=alpha).apply(recipe)
    assert changed.awq.alpha == alpha and changed.awq.fold_down == recipe.awq.fold_down
    assert RecipeChanges().apply(recipe) == recipe.model_copy(update={"effort": "imatrix"})
