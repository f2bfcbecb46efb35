"""The commands that say what making files takes: plan and tiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .console import duration, emit, gigabytes, paragraph, table
from .fitting import FittedPlan, fit_request, fitted_plan, told
from .several import asked_tiers

if TYPE_CHECKING:
    from ..spec.efforts import EffortCost
    from ..spec.estimates import PlanSummary, PlanTable, TierTable
    from ..spec.several import SeveralPlan


def plan(
    tier: opt.Tiers = None,
    all_tiers: opt.AllTiers = False,
    recipe: opt.RecipeFile = None,
    memory: opt.Memory = None,
    size: opt.Size = None,
    bits: opt.Bits = None,
    context: opt.Context = None,
    measurement: opt.MeasurementFile = None,
    avoid: opt.Avoid = None,
    write_recipe: opt.WriteRecipe = None,
    source: opt.SourceName = None,
    jobs: opt.Jobs = None,
    shard_cache: opt.Shards = 2,
    as_json: opt.Json = False,
) -> None:
    """Show what a build will take.

    Hours, downloads, disk and memory of each effort, and the memory that the file runs in, of one tier, of each of
    them, or of several that are built in one pass. All of it follows from the recipe and a config.json: no weight is
    read.

    \b
    Examples:
      mq-quant plan
      mq-quant plan --tier mq2-lloyd
      mq-quant plan --all-tiers
      mq-quant plan --source MiniMaxAI/MiniMax-M2.5
      mq-quant plan --tier mq3 --source ./MiniMax-M2 --json
      mq-quant plan --memory 96GB --write-recipe mine.yaml
    """
    from ...kernels.runtime.drivers import best_device
    from ..spec.estimates import plan_summary, plan_table
    from ..spec.several import several_plan

    names = asked_tiers(tier, all_tiers, recipe)
    wanted = fit_request(
        (memory, size, bits, context), (names, recipe), (source, None), measurement, avoid, write_recipe
    )
    if wanted is not None:
        fitted = fitted_plan(wanted, write_recipe, jobs, shard_cache, best_device())
        emit(fitted, as_json, _render_fitted)
    elif len(names) > 1:
        emit(several_plan(names, source, jobs, shard_cache, best_device()), as_json, _render_several)
    elif not names and recipe is None:
        emit(plan_table(source, jobs, shard_cache, best_device()), as_json, _render_table)
    else:
        (name,) = names or (None,)
        result = plan_summary(name, recipe, source, jobs, shard_cache, best_device())
        emit(result, as_json, _render_plan)


def _render_fitted(result: FittedPlan) -> str:
    return "\n".join((*told(result.fitted), *map(paragraph, result.notes), _render_plan(result.plan)))


def _render_plan(result: PlanSummary) -> str:
    rows = [(name, row.tensors, row.weights, gigabytes(row.bytes)) for name, row in result.by_format.items()]
    if result.disk_bytes is None:
        disk = "the file, and as many shards as --shard-cache allows"
    else:
        disk = f"{gigabytes(result.disk_bytes)}, the shards that are fetched included"
    sizes = result.calibration
    folder = gigabytes(sizes.folder_bytes + sizes.unfinished_bytes)
    return "\n".join(
        (
            f"{result.model}.{result.tier}: {gigabytes(result.total_bytes)} in {result.tensor_count} tensors",
            table(("format", "tensors", "weights", "size"), rows),
            f"to run it: {gigabytes(result.run_bytes)}, which a machine of {result.memory} has",
            f"disk for the build: {disk}",
            f"on this machine, {_where(result.device)}, with the disk that is taken beside the file:",
            *_render_efforts(result.efforts),
            f"to calibrate on {sizes.tokens} tokens into a folder: memory about {gigabytes(sizes.memory_bytes)}, "
            f"disk {folder}",
            *(paragraph(f"warning: {text}") for text in result.warnings),
        )
    )


def _render_several(result: SeveralPlan) -> str:
    rows = [(row.tier, gigabytes(row.total_bytes), row.memory) for row in result.table.tiers]
    together = f"{len(rows)} files, together {gigabytes(result.total_bytes)}"
    if result.disk_bytes is None:
        disk = "the files, and as many shards as --shard-cache allows"
    else:
        disk = f"{gigabytes(result.disk_bytes)}, the shards that are fetched included"
    return "\n".join(
        (
            f"{result.model}, {together}:",
            table(("tier", "file", "fits in"), rows),
            paragraph(result.table.memory_note),
            "",
            f"disk for the build: {disk}",
            f"all of them in one pass, by effort, {_where(result.device)}, with {result.jobs} workers, the disk beside "
            "the files:",
            *_render_efforts(result.efforts),
            *_render_warnings(result.table),
        )
    )


def _render_efforts(costs: tuple[EffortCost, ...]) -> Iterator[str]:
    """The table of efforts, and how long the download takes on two usual lines."""
    rows = [
        (
            f"{cost.effort}{' (default)' if cost.default else ''}",
            cost.tokens or "",
            duration(3600 * cost.hours),
            gigabytes(cost.memory_bytes),
            gigabytes(cost.disk_bytes) if cost.disk_bytes else "",
            gigabytes(cost.download_bytes) if cost.download_bytes else "",
        )
        for cost in costs
    ]
    yield table(("effort", "tokens", "about", "memory", "disk", "download"), rows)
    most = max((cost.download_bytes or 0 for cost in costs), default=0)
    if most:
        slow, fast = (duration(8 * most / bits) for bits in (100e6, 1e9))
        yield f"the download alone takes {slow} at 100 Mbit/s, and {fast} at 1 Gbit/s"


def _where(device: str) -> str:
    return "without a GPU" if device == "cpu" else "on its GPU"


def _render_table(result: PlanTable) -> str:
    rows = []
    for row in result.table.tiers:
        here = "yes" if row.run_bytes <= result.machine_bytes else "no"
        disk = "" if result.streamed_bytes is None else gigabytes(row.total_bytes + result.streamed_bytes)
        rows.append((row.tier, gigabytes(row.total_bytes), row.memory, here, disk))
    return "\n".join(
        (
            f"{result.model}, by tier:",
            table(("tier", "file", "fits in", "fits here", "disk to build"), rows),
            paragraph(
                f"{result.table.memory_note}; this machine has {gigabytes(result.machine_bytes)} of memory"
            ),
            "",
            f"by effort, for any of them, {_where(result.device)}, with {result.jobs} workers, "
            "the disk beside the file:",
            *_render_efforts(result.efforts),
            *_render_warnings(result.table),
        )
    )


def _render_warnings(table: TierTable) -> Iterator[str]:
    """What the engine does with files of these tiers, each warning once."""
    for text in dict.fromkeys(text for row in table.tiers for text in row.warnings):
        names = ", ".join(row.tier for row in table.tiers if text in row.warnings)
        yield f"\n{paragraph(f'warning for {names}: {text}')}"


def tiers(
    source: Annotated[
        str | None,
        typer.Option(help="Sizes for this folder or hub repository instead of the released model."),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """List the tiers with their sizes.

    Beside each stands the memory that a machine needs to run its file.

    \b
    Examples:
      mq-quant tiers
      mq-quant tiers --source tiny
    """
    from ..spec.estimates import tier_table

    emit(tier_table(source), as_json, _render_tiers)


def _render_tiers(result: TierTable) -> str:
    rows = [(row.tier, gigabytes(row.total_bytes), row.memory, row.description) for row in result.tiers]
    listing = table(("tier", "size", "fits in", "what"), rows)
    return "\n".join((listing, "", paragraph(result.memory_note), *_render_warnings(result)))


COMMANDS: dict[str, Callable[..., None]] = {"plan": plan, "tiers": tiers}
