"""The command that tunes a finished file: tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import gigabytes, resumable, show, table
from .progress import Progress

if TYPE_CHECKING:
    from ..tune.file import TuneResult


def tune(
    file: opt.File,
    source: Annotated[
        str,
        typer.Option(
            help="The checkpoint that the file was made from: a folder, a hub repository (owner/name), or `tiny`."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The new file. Default: NAME.tuned.TIER beside NAME.TIER."),
    ] = None,
    text: opt.Text = None,
    tokens: opt.Tokens = None,
    sequences: opt.Sequences = None,
    length: opt.Length = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often the tokens are gone through.")] = 6,
    device: opt.ModelDevice = "cpu",
    jobs: opt.Jobs = None,
    revision: opt.Revision = None,
    shard_cache: opt.Shards = 4,
    force: opt.Force = False,
    restart: opt.Restart = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Train what is continuous in a finished file.

    The result is a new file of the same tensors and sizes. All codes stay; levels, norms, AWQ scales and attention are
    trained layer by layer on a text. A layer that does not get better on a held-out part of the text stays as it is.
    The same command continues a run that was interrupted.

    \b
    Examples:
      mq-quant tune MiniMax-M2.7.mq2-lloyd --source ./MiniMax-M2.7 --device cuda
      mq-quant tune tiny.mq2 --source tiny --sequences 8 --epochs 2 -o better.mq2
      mq-quant tune small.mq3 --source ./small --tokens ids.npy -o small.tuned.mq3
    """
    place = output or file.with_name(f"{file.stem}.tuned{file.suffix}")
    with (
        Progress(f"tune {place.name}", quiet) as progress,
        resumable("the same command continues after the last finished layer"),
    ):
        from ...formats.machine import cores
        from ..calibrate.tokens import TokenRequest, load_tokens
        from ..spec.places import checked_place
        from ..tune.file import TuneOptions, tune_file
        from ..tune.layer import TuneSettings

        asked = opt.token_request(text, tokens, sequences, length) or TokenRequest()
        with checked_place(source, revision, shard_cache, place.parent) as opened:
            ids = load_tokens(opened, asked)
            options = TuneOptions(
                output=place,
                settings=TuneSettings(epochs=epochs),
                device=device,
                jobs=jobs or cores(),
                force=force,
                restart=restart,
                watch=progress,
            )
            result = tune_file(file, opened, ids, options)
    show(result, as_json, quiet, _render)


def _render(result: TuneResult) -> str:
    rows = [
        (layer["layer"], _error(layer["before"]), _error(layer["after"]), "yes" if layer["kept"] else "no")
        for layer in result.layers
    ]
    parts = [
        f"{printable(str(result.path))}: {gigabytes(result.total_bytes)}",
        f"tuned        {result.kept_layers} of {len(result.layers)} layers, on {result.tokens} tokens",
        f"time         {result.seconds:.1f} s",
        f"peak memory  {gigabytes(result.peak_rss_bytes)}",
        f"quantization hash  {result.quantization_hash}",
        "",
        "squared error of each layer's output on held-out tokens, as a share of what the layer adds:",
        table(("layer", "before", "after", "kept"), rows),
        *(layer["note"] for layer in result.layers if "note" in layer),
    ]
    return "\n".join(parts)


def _error(share: float | None) -> str:
    return "-" if share is None else f"{share:.5f}"


COMMANDS: dict[str, Callable[..., None]] = {"tune": tune}
