"""The commands that make files: build, plan and tiers. Thin: they read options, call the pipeline and print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import emit, gigabytes, table

Tier = Annotated[str | None, typer.Option(help="A tier's name; `mq-quant tiers` lists them.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe of your own (YAML).")]
SourceName = Annotated[
    str | None,
    typer.Option(help="A folder, a hub repository (owner/name), or `tiny`. Default: the recipe's."),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Worker threads. Default: one per core.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def plan(
    tier: Tier = None,
    recipe: RecipeFile = None,
    source: SourceName = None,
    jobs: Jobs = None,
    as_json: Json = False,
) -> None:
    """Show every size of a build before it starts; needs nothing but the recipe or a config.json.

    \b
    Examples:
      mq-quant plan --tier mq2-lloyd
      mq-quant plan --tier mq3 --source ./MiniMax-M2 --json
    """
    from .offline import plan_summary

    emit(plan_summary(tier, recipe, source, jobs), as_json, _render_plan)


def _render_plan(result: Mapping[str, Any]) -> str:
    rows = [
        (name, row["tensors"], row["weights"], gigabytes(row["bytes"]))
        for name, row in result["by_format"].items()
    ]
    head = f"{result['model']}.{result['tier']}: {gigabytes(result['total_bytes'])} in {result['tensor_count']} tensors"
    memory = f"memory for the build: about {gigabytes(result['peak_memory_bytes'])}"
    return "\n".join([head, table(("format", "tensors", "weights", "size"), rows), memory])


def tiers(
    source: Annotated[str | None, typer.Option(help="Sizes for this folder or repository instead.")] = None,
    as_json: Json = False,
) -> None:
    """List the tiers with their sizes and the memory they fit.

    \b
    Examples:
      mq-quant tiers
      mq-quant tiers --source tiny
    """
    from .offline import tier_table

    emit(tier_table(source), as_json, _render_tiers)


def _render_tiers(result: Mapping[str, Any]) -> str:
    rows = [
        (row["tier"], gigabytes(row["total_bytes"]), row["memory"], row["description"])
        for row in result["tiers"]
    ]
    return table(("tier", "size", "fits in", "what"), rows) + f"\n\n{result['memory_note']}"


COMMANDS: dict[str, Callable[..., None]] = {"plan": plan, "tiers": tiers}
