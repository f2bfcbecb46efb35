"""`mq-quant recipes`: the bundled recipes as a list, as text, and as copies to change."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...formats.errors import OutputError
from ...formats.own_file import check_place, is_stream
from ..spec.recipe import DEFAULT_MODEL, bundled_path, fitted_tiers, load_model, load_tier, models, tiers
from ..write.atomic import write_result

_OF_THE_BUNDLED_FILE = re.compile(r"^quantization_hash:.*\n", re.MULTILINE)


@dataclass(frozen=True)
class RecipeLine:
    """One bundled recipe."""

    tier: str
    description: str


@dataclass(frozen=True)
class ModelLine:
    """One model that recipes can name, and its place as `--source` takes it."""

    model: str
    source: str


@dataclass(frozen=True)
class RecipeList:
    """All bundled recipes of a model, and the models that are known."""

    model: str
    recipes: tuple[RecipeLine, ...]
    models: tuple[ModelLine, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RecipeText:
    """A bundled recipe as it is written; `copied_to` is the file that was written, if one was."""

    tier: str
    model: str
    text: str
    copied_to: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def list_recipes(model: str = DEFAULT_MODEL) -> RecipeList:
    """The bundled recipes of a model; RecipeError where there is no such model."""
    bundled, names = tiers(model) + fitted_tiers(model), models()
    lines = tuple(RecipeLine(tier, load_tier(tier, model).description) for tier in bundled)
    return RecipeList(model, lines, tuple(ModelLine(name, load_model(name).place.address) for name in names))


def recipe_text(tier: str, model: str = DEFAULT_MODEL) -> RecipeText:
    """A bundled recipe as it is written; RecipeError, with the nearest name, where there is none."""
    load_tier(tier, model)
    return RecipeText(tier, model, bundled_path(tier, model).read_text(encoding="utf-8"))


def copy_recipe(tier: str, model: str, path: Path, force: bool = False) -> RecipeText:
    """Write a copy of a bundled recipe to change; OutputError where the file exists and `force` is not given."""
    found = recipe_text(tier, model)
    check_place(path, stream=True)
    if os.path.lexists(path) and not (force or is_stream(path)):
        raise OutputError("exists already", file=path, hint="give --force to replace it, or another name")
    text = (
        f"# A copy of the recipe {tier} for {model}. Give it a `tier` of its own: files are named after it.\n"
        f"{_OF_THE_BUNDLED_FILE.sub('', found.text)}"
    )
    write_result(path, [memoryview(text.encode())])
    return RecipeText(tier, model, text, str(path))
