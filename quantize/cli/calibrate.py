"""The command that gathers second moments: calibrate. Thin: it reads options, calls the pipeline and prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .build import Jobs, Json, _percent, _some
from .console import emit, gigabytes, note, resumable

if TYPE_CHECKING:
    from ..spec.estimates import CalibrationSizes

DEVICES = ("cpu", "cuda")
PROPAGATE = ("source", "quantised")


def calibrate(
    source: Annotated[str, typer.Option(help="A folder, a hub repository (owner/name), or `tiny`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The calibration folder to write.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text, cut into sequences.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="A .npy of token ids [sequences, length].")] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Use this many sequences. Default: all there are.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence of a --text.")] = 512,
    down: Annotated[
        str,
        typer.Option(help="How down's moments are kept: full (f32), compact (f16) or pooled (one a layer)."),
    ] = "compact",
    propagate: Annotated[
        str,
        typer.Option(help="What the next layer sees: the source's outputs, or those of the quantised layer."),
    ] = "source",
    tier: Annotated[
        str | None, typer.Option(help="The tier to quantise with, for --propagate quantised.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Or a recipe of your own (YAML).")] = None,
    jobs: Jobs = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (which is ROCm's name too).")] = "cpu",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub repository.")] = None,
    shard_cache: Annotated[
        int, typer.Option(min=1, help="Shards of a hub source that may be on the disk at once.")
    ] = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the sizes only.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished calibration.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished calibration.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no result.")] = False,
    as_json: Json = False,
) -> None:
    """Run the FP8 model on text and gather E[x xᵀ] of what its experts see. The same command continues after a stop.

    \b
    Examples:
      mq-quant calibrate --source ./MiniMax-M2.7 --text corpus.txt --sequences 128 -o calib
      mq-quant calibrate --source ./MiniMax-M2.7 --tokens ids.npy --device cuda -o calib
      mq-quant calibrate --source tiny --tokens ids.npy --propagate quantised --tier mq2 -o calib
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --calibration calib
    """
    from ...formats.machine import cores
    from ...formats.statistics.moment_file import DOWN_FORMS, DownForm
    from ..calibrate.run import CalibrationOptions
    from ..calibrate.run import calibrate as run
    from ..calibrate.tokens import TokenRequest, load_tokens
    from ..spec.estimates import calibration_sizes
    from ..spec.places import choose_recipe, open_place
    from .progress_bar import Progress

    _one_of("--down", down, DOWN_FORMS)
    _one_of("--device", device, DEVICES)
    _one_of("--propagate", propagate, PROPAGATE)
    if propagate == "source" and (tier or recipe):
        raise typer.BadParameter("--tier and --recipe go with --propagate quantised")
    chosen = choose_recipe(tier, recipe, source) if propagate == "quantised" else None
    if (text is None) == (tokens is None):
        raise typer.BadParameter("give either --text or --tokens")
    opened = open_place(source, revision, shard_cache, output.parent)
    with closing(opened), resumable("the same command continues after the last finished layer"):
        opened.validate()
        ids = load_tokens(opened, TokenRequest(text, tokens, sequences, length))
        form = cast(DownForm, down)
        sizes = calibration_sizes(opened.config, ids.size, form)
        if dry_run:
            emit(sizes, as_json, _render_sizes)
            return
        if not (quiet or as_json):
            note(_render_sizes(sizes))
        with Progress(f"calibrate {output.name}", quiet or as_json) as bar:
            options = CalibrationOptions(
                down=form,
                propagate=chosen,
                device=device,
                jobs=jobs or cores(),
                force=force,
                restart=restart,
                on_start=bar.start,
                on_read=lambda weights, layer: bar.advance(weights, f"layer {layer}"),
            )
            result = run(opened, ids, output, options).as_json()
    if as_json or not quiet:
        emit(result, as_json, _render)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)


def _render_sizes(sizes: CalibrationSizes) -> str:
    return (
        f"{sizes.tokens} tokens: memory about {gigabytes(sizes.memory_bytes)}, folder "
        f"{gigabytes(sizes.folder_bytes)}, while unfinished {gigabytes(sizes.unfinished_bytes)} more"
    )


def _render(result: Mapping[str, Any]) -> str:
    return "\n".join(
        (
            f"{result['path']}: {gigabytes(result['folder_bytes'])}",
            f"gathered     {result['layers']} layers, {result['tokens']} tokens",
            f"time         {result['seconds']:.1f} s",
            f"peak memory  {gigabytes(result['peak_rss_bytes'])}",
            f"coverage     {_percent(result['coverage'])}",
            f"notes        {_some(result['notes'])}",
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {"calibrate": calibrate}
