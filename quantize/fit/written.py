"""A fitted recipe as a YAML file that a person can read, change, and build from without the measurement."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import yaml

from ...formats.errors import OutputError
from ...formats.own_file import check_place, is_stream
from ..spec.recipe import Recipe, load_model, models
from ..write.atomic import write_result
from .fitted import Fitted

WIDTH = 118


def recipe_text(fitted: Fitted, asked: str) -> str:
    """The recipe with comments on what was asked for, as options say it; reading it gives the same recipe."""
    recipe = fitted.recipe
    lines = [f"# {line}" for line in textwrap.wrap(_about(fitted, asked), WIDTH)]
    lines += [
        "schema: 1",
        f"tier: {_yaml(recipe.tier)}",
        f"description: {_yaml(recipe.description)}",
        f"model: {_yaml(_model(recipe))}",
        "rules:",
        *(f"  - {{tensors: {_quoted(rule.tensors)}, format: {rule.format}}}" for rule in recipe.rules),
        *([f"effort: {recipe.effort}"] if recipe.effort else []),
        f"fit: {recipe.fit}",
        f"gain: {_yaml(recipe.gain)}",
        f"awq: {_yaml(recipe.awq.model_dump(mode='json'))}",
        f"verify: {_yaml(recipe.verify.model_dump(mode='json', exclude_defaults=True))}",
    ]
    return "\n".join(lines) + "\n"


def write_recipe(path: Path, fitted: Fitted, asked: str) -> None:
    """Write the recipe to a file, which may be there already if it holds just this; OutputError otherwise."""
    text = recipe_text(fitted, asked).encode()
    check_place(path, stream=True)
    if os.path.lexists(path) and not is_stream(path):
        if path.is_file() and path.read_bytes() == text:
            return
        raise OutputError(
            "exists already", file=path, hint="give another name to --write-recipe, or remove it"
        )
    write_result(path, [memoryview(text)])


def _about(fitted: Fitted, asked: str) -> str:
    kld = fitted.expected_kld
    expected = (
        "Its KLD is not known, since nobody has measured this model."
        if kld is None
        else f"Expected KLD on the text of the measurement: {kld:.4g}."
    )
    best = "Nothing was better than this tier" if fitted.tier else "The formats that lose least"
    return (
        f"{best} under {asked}: at most {fitted.limit} bytes. The file will have about {fitted.total_bytes}. "
        f"Chosen by {fitted.origin}. {expected}"
    )


def _model(recipe: Recipe) -> Any:
    """The name of a bundled model; any other is written out."""
    known = next((name for name in models() if load_model(name) == recipe.model), None)
    return known or recipe.model.model_dump(mode="json", by_alias=True, exclude_none=True)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _quoted(pattern: str) -> str:
    return "'" + pattern.replace("'", "''") + "'"
