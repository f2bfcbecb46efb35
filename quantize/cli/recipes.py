"""The command over the bundled recipes: recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import emit, table

if TYPE_CHECKING:
    from ..inspect.recipes import RecipeList, RecipeText


def recipes(
    tier: Annotated[
        str | None,
        typer.Argument(
            metavar="[TIER]",
            help="The recipe to show. Without it all are listed.",
            autocompletion=opt.tier_names,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="The model whose recipes are meant, such as `tiny`.")
    ] = "minimax-m2.7",
    copy: Annotated[
        Path | None, typer.Option("--copy", help="Write the recipe to this file, for you to change.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: opt.Json = False,
) -> None:
    """List, show or copy the bundled recipes.

    A copy is yours to change: give it to `build --recipe`.

    \b
    Examples:
      mq-quant recipes
      mq-quant recipes mq2-lloyd
      mq-quant recipes mq2-lloyd --copy mine.yaml
    """
    from ..inspect.recipes import copy_recipe, list_recipes, recipe_text

    if force and copy is None:
        raise typer.BadParameter("--force goes with --copy")
    if tier is None:
        if copy is not None:
            raise typer.BadParameter("--copy needs the name of a tier")
        emit(list_recipes(model), as_json, _render_list)
    elif copy is None:
        emit(recipe_text(tier, model), as_json, lambda found: found.text.rstrip("\n"))
    else:
        emit(copy_recipe(tier, model, copy, force), as_json, _render_copy, finished=True)


def _render_list(result: RecipeList) -> str:
    lines = [table(("recipe", "what"), [(line.tier, line.description) for line in result.recipes])]
    if not result.recipes:
        lines = [f"{result.model} has no recipes of its own; those of minimax-m2.7 fit it"]
    known = table(("model", "--source"), [(line.model, line.source) for line in result.models])
    return "\n".join((*lines, "", known))


def _render_copy(result: RecipeText) -> str:
    path = printable(result.copied_to or "")
    return f"{path}: a copy of {result.tier}; change it, and build with --recipe {path}"


COMMANDS: dict[str, Callable[..., None]] = {"recipes": recipes}
