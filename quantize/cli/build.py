"""The commands that make files or say what making them takes: build, plan and tiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import coverage, emit, gigabytes, listed, note, resumable, table

if TYPE_CHECKING:
    from ..calibrate.tokens import TokenRequest
    from ..pipeline.build import BuildResult
    from ..pipeline.statistics import Statistics
    from ..spec.estimates import PlanSummary, TierTable

_CALIBRATE = "For --calibrate-inline: "


def build(
    tier: opt.Tier = None,
    recipe: opt.RecipeFile = None,
    source: opt.SourceName = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write. Default: MODEL.TIER in this folder."),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="An importance matrix (llama.cpp's GGUF or .dat) instead of the recipe's."),
    ] = None,
    no_imatrix: Annotated[
        bool,
        typer.Option("--no-imatrix", help="Build without importances and AWQ scales. The file says so."),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A folder that `mq-quant calibrate` made, instead of an imatrix. With --imatrix too, that one serves "
            "the experts that saw few tokens."
        ),
    ] = None,
    calibrate_inline: Annotated[
        bool,
        typer.Option(
            "--calibrate-inline",
            help="Calibrate each layer on --text or --tokens just before it is encoded, and keep no folder.",
        ),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help=f"{_CALIBRATE}a UTF-8 text file, which is cut into sequences.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help=f"{_CALIBRATE}a .npy file of token ids [sequences, length].")
    ] = None,
    sequences: opt.Sequences = None,
    length: opt.Length = 512,
    fit: Annotated[
        opt.Fit | None,
        typer.Option(
            help="How codes and levels are chosen, instead of the recipe's way: as the engine's own quantiser does "
            "(reference), for the least squared error (exact), or for the least error of the outputs (hessian)."
        ),
    ] = None,
    no_gain: Annotated[
        bool,
        typer.Option("--no-gain", help="Leave the levels as fitted, without the factor against shrinking."),
    ] = False,
    awq_alpha: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="The exponent of the AWQ scales, instead of a search for the best."),
    ] = None,
    device: Annotated[
        opt.BuildDevice,
        typer.Option(
            help="Where weights are encoded; `cuda` means an AMD GPU too. The bytes are the same everywhere, but for "
            "the moments of --calibrate-inline. The fit `reference` stays on the CPU."
        ),
    ] = "cpu",
    jobs: opt.Jobs = None,
    shard_cache: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Shards of a hub source that may lie on the disk at once. Default: 2, with --calibrate-inline 4.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the unfinished build of this output and begin anew.")
    ] = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Build the file of a tier.

    The same command continues a build that was interrupted.

    \b
    Examples:
      mq-quant build --tier mq2-lloyd --source tiny
      mq-quant build --tier mq3 --source ./MiniMax-M2.7 --imatrix imatrix.gguf -o /data/m27.mq3
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --calibration calib
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --imatrix imatrix.gguf --device cuda
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --calibrate-inline --text corpus.txt --sequences 128
      mq-quant build --recipe mine.yaml --jobs 8 --json
    """
    from ...formats.machine import cores
    from ..encode.encoders import open_encoder
    from ..pipeline.build import RunOptions, build_file
    from ..pipeline.build_spec import RecipeChanges, output_name
    from ..spec.places import choose_recipe
    from .progress_bar import Progress

    given = _inline(calibrate_inline, text, tokens, sequences, length)
    statistics = _statistics(imatrix, no_imatrix, calibration, given, "cpu" if device == "cpu" else "cuda")
    if no_imatrix and (fit == "hessian" or awq_alpha):
        raise typer.BadParameter("--no-imatrix leaves nothing for --fit hessian or --awq-alpha to work with")
    changes = RecipeChanges(fit, False if no_gain else None, awq_alpha)
    chosen = choose_recipe(tier, recipe, source)
    title = output.name if output else output_name(chosen)
    with (
        resumable("the same command continues the build, with --restart it begins anew"),
        open_encoder(device) as encoder,
        Progress(title, quiet or as_json) as bar,
    ):
        options = RunOptions(
            output=output,
            jobs=jobs or cores(),
            encoder=encoder,
            force=force,
            restart=restart,
            shard_cache=shard_cache,
            on_note=lambda sentence: note(f"note: {sentence}"),
            on_start=bar.start,
            on_done=lambda unit: bar.advance(unit.weights, unit.key),
        )
        result = build_file(chosen, statistics, options, changes)
    if as_json or not quiet:
        emit(result, as_json, _render_build, finished=True)


def _statistics(
    imatrix: Path | None, no_imatrix: bool, calibration: Path | None, tokens: TokenRequest | None, device: str
) -> Statistics | None:
    """The statistics that the options ask for; options that contradict each other are refused."""
    from ..pipeline.statistics import ImatrixFile, MomentFolder, NoStatistics, OnTheFly

    if no_imatrix and imatrix:
        raise typer.BadParameter("--no-imatrix leaves nothing for --imatrix to do: give one of the two")
    if no_imatrix and (calibration or tokens):
        raise typer.BadParameter(
            "a calibration is an importance, --no-imatrix asks for none: give one of the two"
        )
    if calibration and tokens:
        raise typer.BadParameter(
            "--calibrate-inline gathers what --calibration has already: give one of the two"
        )
    if no_imatrix:
        return NoStatistics()
    if tokens is not None:
        return OnTheFly(tokens, device, imatrix)
    if calibration is not None:
        return MomentFolder(calibration, imatrix)
    return ImatrixFile(imatrix) if imatrix is not None else None


def _inline(
    wanted: bool, text: Path | None, tokens: Path | None, sequences: int | None, length: int
) -> TokenRequest | None:
    from ..calibrate.tokens import TokenRequest

    given = [name for name, value in (("--text", text), ("--tokens", tokens)) if value is not None]
    if not wanted and (given or sequences is not None):
        raise typer.BadParameter(f"{given[0] if given else '--sequences'} goes with --calibrate-inline")
    if not wanted:
        return None
    if len(given) != 1:
        raise typer.BadParameter("--calibrate-inline needs either --text or --tokens")
    return TokenRequest(text, tokens, sequences, length)


def _render_build(result: BuildResult) -> str:
    return "\n".join(
        (
            f"{printable(str(result.path))}: {gigabytes(result.total_bytes)} in {result.tensor_count} tensors",
            f"quantization hash  {result.quantization_hash}",
            f"time               {result.seconds:.1f} s, {result.weights_per_second / 1e6:.1f} M weights/s",
            f"peak memory        {gigabytes(result.peak_rss_bytes)}",
            f"expert coverage    {coverage(result.coverage)}",
            f"fallbacks          {len(result.fallbacks) or 'none'}",
            *(f"  {line}" for line in listed(result.fallbacks, "inspect --provenance shows them")),
        )
    )


def plan(
    tier: opt.Tier = None,
    recipe: opt.RecipeFile = None,
    source: opt.SourceName = None,
    jobs: opt.Jobs = None,
    shard_cache: Annotated[
        int, typer.Option(min=1, help="Shards of a hub source that may lie on the disk at once.")
    ] = 2,
    as_json: opt.Json = False,
) -> None:
    """Show what a build will take.

    The size of the file, memory and disk follow from the recipe and a config.json: no weight is read.

    \b
    Examples:
      mq-quant plan --tier mq2-lloyd
      mq-quant plan --tier mq3 --source ./MiniMax-M2 --json
    """
    from ..spec.estimates import plan_summary

    emit(plan_summary(tier, recipe, source, jobs, shard_cache), as_json, _render_plan)


def _render_plan(result: PlanSummary) -> str:
    rows = [(name, row.tensors, row.weights, gigabytes(row.bytes)) for name, row in result.by_format.items()]
    if result.disk_bytes is None:
        disk = "the file, and as many shards as --shard-cache allows"
    else:
        disk = f"{gigabytes(result.disk_bytes)}, the shards that are fetched included"
    sizes, inline = result.calibration, result.calibrate_inline
    folder = gigabytes(sizes.folder_bytes + sizes.unfinished_bytes)
    return "\n".join(
        (
            f"{result.model}.{result.tier}: {gigabytes(result.total_bytes)} in {result.tensor_count} tensors",
            table(("format", "tensors", "weights", "size"), rows),
            f"memory for the build: about {gigabytes(result.peak_memory_bytes)}",
            f"disk for the build: {disk}",
            f"to calibrate on {sizes.tokens} tokens: memory about {gigabytes(sizes.memory_bytes)}, disk {folder}",
            f"to calibrate on them inside the build: memory about {gigabytes(inline.memory_bytes)}, "
            f"{gigabytes(inline.disk_bytes)} of disk beside the file",
        )
    )


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
    return table(("tier", "size", "fits in", "what"), rows) + f"\n\n{result.memory_note}"


COMMANDS: dict[str, Callable[..., None]] = {"build": build, "plan": plan, "tiers": tiers}
