"""The command that gathers the moments of what experts see: calibrate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import coverage, emit, gigabytes, listed, note, resumable, show
from .progress import Progress

if TYPE_CHECKING:
    from ..calibrate.run import CalibrationResult
    from ..calibrate.state import StateResult
    from ..spec.calibration_sizes import CalibrationSizes


def calibrate(
    source: Annotated[
        str,
        typer.Option(help="The checkpoint: a folder, a hub repository (owner/name), or `tiny`."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The calibration folder to write.")],
    text: opt.Text = None,
    tokens: opt.Tokens = None,
    sequences: opt.Sequences = None,
    length: opt.Length = None,
    down: Annotated[
        opt.DownForm | None,
        typer.Option(
            help="How the moments of the down projections are kept: of each expert in f32 (full) or as f16 "
            "correlations (compact, the default), or one for a whole layer (pooled)."
        ),
    ] = None,
    propagate: Annotated[
        opt.Propagate,
        typer.Option(
            help="What the next layer is given: the outputs of the checkpoint's layer, or of that layer quantised."
        ),
    ] = "source",
    tier: Annotated[
        str | None, typer.Option(help="For --propagate quantised: the tier to quantise with.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="For --propagate quantised: a recipe of your own (YAML).")
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep no moments, but the streams that enter each of so many equal parts, for `build --part` with "
            "--calibration-state.",
        ),
    ] = None,
    jobs: opt.Jobs = None,
    device: opt.ModelDevice = "cpu",
    revision: opt.Revision = None,
    shard_cache: opt.Shards = 4,
    dry_run: opt.DryRun = False,
    force: opt.Force = False,
    restart: opt.Restart = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Gather statistics for better builds.

    The FP8 model runs on a text, layer by layer, and the second moments of what its experts see are kept in a folder.
    The same command continues a calibration that was interrupted.

    \b
    Examples:
      mq-quant calibrate --source ./MiniMax-M2.7 -o calib
      mq-quant calibrate --source ./MiniMax-M2.7 --text corpus.txt --sequences 128 -o calib
      mq-quant calibrate --source ./MiniMax-M2.7 --tokens ids.npy --device cuda -o calib
      mq-quant calibrate --source tiny --tokens ids.npy --propagate quantised --tier mq2 -o calib
      mq-quant calibrate --source ./MiniMax-M2.7 --streams 8 -o state
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --calibration calib
    """
    if propagate == "source" and (tier or recipe):
        raise typer.BadParameter("--tier and --recipe go with --propagate quantised")
    if streams and (propagate != "source" or dry_run or down):
        raise typer.BadParameter(
            "--streams are those of the source, without moments: leave --propagate, --down and --dry-run out"
        )
    form = down or "compact"
    with (
        Progress(f"calibrate {output.name}", quiet) as progress,
        resumable("the same command continues after the last finished layer"),
    ):
        from ...formats.checkpoint.source import lies_here
        from ...formats.machine import cores
        from ..calibrate.run import CalibrationOptions
        from ..calibrate.run import calibrate as run
        from ..calibrate.state import StateOptions, equal_parts, make_state
        from ..calibrate.tokens import TokenRequest, load_tokens
        from ..spec.calibration_sizes import calibration_sizes
        from ..spec.places import checked_place, choose_recipe

        chosen = choose_recipe(tier, recipe, source) if propagate == "quantised" else None
        asked = opt.token_request(text, tokens, sequences, length) or TokenRequest()
        with checked_place(source, revision, shard_cache, output.parent) as opened:
            ids = load_tokens(opened, asked)
            if streams:
                first = equal_parts(opened.config.num_hidden_layers, streams)
                how = StateOptions(first, device, force, restart, lies_here(opened), progress)
                state = make_state(opened, ids, output, how)
                show(state, as_json, quiet, _render_state)
                return
            sizes = calibration_sizes(opened.config, ids.size, form)
            if dry_run:
                emit(sizes, as_json, _render_sizes)
                return
            if not (quiet or as_json):
                note(_render_sizes(sizes))
            options = CalibrationOptions(
                down=form,
                propagate=chosen,
                device=device,
                jobs=jobs or cores(),
                force=force,
                restart=restart,
                watch=progress,
            )
            result = run(opened, ids, output, options)
    show(result, as_json, quiet, _render)


def _render_sizes(sizes: CalibrationSizes) -> str:
    return (
        f"{sizes.tokens} tokens: memory about {gigabytes(sizes.memory_bytes)}, folder "
        f"{gigabytes(sizes.folder_bytes)}, while unfinished {gigabytes(sizes.unfinished_bytes)} more"
    )


def _render(result: CalibrationResult) -> str:
    return "\n".join(
        (
            f"{printable(str(result.path))}: {gigabytes(result.folder_bytes)}",
            f"gathered     {result.layers} layers, {result.tokens} tokens",
            f"time         {result.seconds:.1f} s",
            f"peak memory  {gigabytes(result.peak_rss_bytes)}",
            f"coverage     {coverage(result.coverage)}",
            f"notes        {len(result.notes) or 'none'}",
            *(f"  {line}" for line in listed(result.notes, "--json shows them")),
        )
    )


def _render_state(result: StateResult) -> str:
    return "\n".join(
        (
            f"{printable(str(result.path))}: {gigabytes(result.folder_bytes)}",
            f"streams      {len(result.streams)}, into layers {', '.join(map(str, result.streams))}",
            f"time         {result.seconds:.1f} s",
            f"peak memory  {gigabytes(result.peak_rss_bytes)}",
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {"calibrate": calibrate}
