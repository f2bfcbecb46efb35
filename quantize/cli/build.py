"""The commands that make files: build, plan and tiers. Thin: they read options, call the pipeline and print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ...formats.text import printable
from .console import emit, gigabytes, note, resumable, table

if TYPE_CHECKING:
    from ..calibrate.tokens import TokenRequest
    from ..pipeline.statistics import Statistics
    from ..spec.estimates import PlanSummary, TierTable
    from ..spec.recipe import Fit

SHOWN = 8
FITS = ("reference", "exact", "hessian")

Tier = Annotated[str | None, typer.Option(help="A tier's name; `mq-quant tiers` lists them.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe of your own (YAML).")]
SourceName = Annotated[
    str | None,
    typer.Option(help="A folder, a hub repository (owner/name), or `tiny`. Default: the recipe's."),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Worker threads. Default: one per core.")]
ShardCache = Annotated[
    int, typer.Option(min=1, help="Shards of a hub source that may be on the disk at once.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def build(
    tier: Tier = None,
    recipe: RecipeFile = None,
    source: SourceName = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: <model>.<tier> in the current folder.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix (GGUF or .dat) instead of the recipe's.")
    ] = None,
    no_imatrix: Annotated[
        bool, typer.Option("--no-imatrix", help="Plain build: no importance, no AWQ; the file says so.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `mq-quant calibrate` instead of the recipe's imatrix; --imatrix then backs thin moments."
        ),
    ] = None,
    calibrate_inline: Annotated[
        bool,
        typer.Option(
            "--calibrate-inline",
            help="Gather each layer's moments from --text or --tokens just before it is encoded, and keep none.",
        ),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="For --calibrate-inline: a UTF-8 text, cut into sequences.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="For --calibrate-inline: a .npy of token ids [sequences, length].")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Use this many sequences. Default: all there are.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence of a --text.")] = 512,
    fit: Annotated[
        str | None, typer.Option(help="reference, exact or hessian, instead of the recipe's.")
    ] = None,
    no_gain: Annotated[
        bool, typer.Option("--no-gain", help="Leave the levels as fitted, without the unbiased gain.")
    ] = False,
    awq_alpha: Annotated[
        float | None, typer.Option(min=0, max=2, help="Pin the AWQ exponent instead of searching it.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda (which is ROCm's name too) or hip. The file is the same, but for the last bits of moments "
            "that --calibrate-inline gathers; `reference` stays on the CPU."
        ),
    ] = "cpu",
    jobs: Jobs = None,
    shard_cache: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Shards of a hub source that may be on the disk at once. Default: 2, or 4 with --calibrate-inline.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished build.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no result.")] = False,
    as_json: Json = False,
) -> None:
    """Build a tier. An interrupted build continues when the same command is run again.

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
    changes = RecipeChanges(_fit(fit), False if no_gain else None, awq_alpha)
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
            on_note=lambda sentence: note(f"note: {printable(sentence)}"),
            on_start=bar.start,
            on_done=lambda unit: bar.advance(unit.weights, unit.key),
        )
        result = build_file(chosen, statistics, options, changes).as_json()
    if as_json or not quiet:
        emit(result, as_json, _render_build)


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


def _fit(name: str | None) -> Fit | None:
    if name is None or name in FITS:
        return cast("Fit | None", name)
    raise typer.BadParameter(f"{name!r} is not one of {', '.join(FITS)}", param_hint="--fit")


def _render_build(result: Mapping[str, Any]) -> str:
    return "\n".join(
        (
            f"{result['path']}: {gigabytes(result['total_bytes'])} in {result['tensor_count']} tensors",
            f"quantization hash  {result['quantization_hash']}",
            f"time               {result['seconds']:.1f} s, {result['weights_per_second'] / 1e6:.1f} M weights/s",
            f"peak memory        {gigabytes(result['peak_rss_bytes'])}",
            f"expert coverage    {_percent(result['coverage'])}",
            f"fallbacks          {_some(result['fallbacks'])}",
        )
    )


def _percent(share: float | None) -> str:
    return "no importances" if share is None else f"{share:.1%} of the experts"


def _some(notes: Sequence[str]) -> str:
    if not notes:
        return "none"
    more = [f"and {len(notes) - SHOWN} more (inspect --provenance shows them)"] if len(notes) > SHOWN else []
    return "\n".join([str(len(notes)), *(f"  {note}" for note in notes[:SHOWN]), *more])


def plan(
    tier: Tier = None,
    recipe: RecipeFile = None,
    source: SourceName = None,
    jobs: Jobs = None,
    shard_cache: ShardCache = 2,
    as_json: Json = False,
) -> None:
    """Show every size of a build before it starts; needs nothing but the recipe or a config.json.

    \b
    Examples:
      mq-quant plan --tier mq2-lloyd
      mq-quant plan --tier mq3 --source ./MiniMax-M2 --json
    """
    from ..spec.estimates import plan_summary

    emit(plan_summary(tier, recipe, source, jobs, shard_cache), as_json, _render_plan)


def _render_plan(result: PlanSummary) -> str:
    rows = [(name, row.tensors, row.weights, gigabytes(row.bytes)) for name, row in result.by_format.items()]
    head = f"{result.model}.{result.tier}: {gigabytes(result.total_bytes)} in {result.tensor_count} tensors"
    memory = f"memory for the build: about {gigabytes(result.peak_memory_bytes)}"
    if result.disk_bytes is None:
        disk = "disk for the build: the file, and the shards of --shard-cache"
    else:
        disk = f"disk for the build: {gigabytes(result.disk_bytes)}, the streamed shards included"
    sizes, inline = result.calibration, result.calibrate_inline
    calibration = (
        f"to calibrate on {sizes.tokens} tokens: memory about {gigabytes(sizes.memory_bytes)}, "
        f"disk {gigabytes(sizes.folder_bytes + sizes.unfinished_bytes)}\n"
        f"to calibrate on them inside the build: memory about {gigabytes(inline.memory_bytes)}, "
        f"{gigabytes(inline.disk_bytes)} of disk beside the file"
    )
    return "\n".join([head, table(("format", "tensors", "weights", "size"), rows), memory, disk, calibration])


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
    from ..spec.estimates import tier_table

    emit(tier_table(source), as_json, _render_tiers)


def _render_tiers(result: TierTable) -> str:
    rows = [(row.tier, gigabytes(row.total_bytes), row.memory, row.description) for row in result.tiers]
    return table(("tier", "size", "fits in", "what"), rows) + f"\n\n{result.memory_note}"


COMMANDS: dict[str, Callable[..., None]] = {"build": build, "plan": plan, "tiers": tiers}
