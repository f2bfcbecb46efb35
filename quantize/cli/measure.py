"""The command that measures what each piece of a model loses in each format: measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import duration, emit, gigabytes, note, resumable, show, table
from .progress import Progress

if TYPE_CHECKING:
    from ..fit.before import MeasureCost
    from ..fit.run import MeasureResult


def measure(
    source: opt.SourceName = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="A recipe of your own (YAML), for how matrices are rounded and how other tensors are stored; its "
            "formats of experts do not matter. Default: as all tiers do it.",
        ),
    ] = None,
    revision: opt.Revision = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the measurement is written, as JSON.")
    ] = Path("measurement.json"),
    effort: Annotated[
        opt.MeasureEffort,
        typer.Option(help="How pieces are rounded: as a build of this effort does it."),
    ] = "calibrated",
    imatrix: Annotated[
        Path | None,
        typer.Option(help="An importance matrix (llama.cpp's GGUF or .dat) instead of the model's own."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A folder that `mq-quant calibrate` made, instead of gathering moments here."),
    ] = None,
    text: opt.Text = None,
    tokens: opt.Tokens = None,
    sequences: opt.Sequences = None,
    length: opt.Length = None,
    judge_tokens: Annotated[
        Path | None,
        typer.Option(
            help="Compare predictions on these tokens, a .npy file as --tokens takes it. Default: the evaluation text "
            "that comes with mq-quant; the last sequences of --text or --tokens, on which nothing is calibrated then."
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The number of sequences on which predictions are compared. Default: those of 4096 tokens.",
        ),
    ] = None,
    device: opt.ModelDevice = "cpu",
    jobs: opt.Jobs = None,
    shard_cache: opt.Shards = 4,
    dry_run: opt.DryRun = False,
    force: opt.Force = False,
    restart: opt.Restart = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Measure what each piece of a model loses in each format.

    A piece is gate and up, or down, of one layer. It is rounded alone, to each format that the engine runs, and the KL
    divergence of the next tokens from the source's is written down, for `build --size` and `build --memory`. The same
    command continues a measurement that was interrupted, after the last finished layer.

    \b
    Examples:
      mq-quant measure --source tiny --sequences 8 --length 64 --held-out 2 -o tiny.json
      mq-quant measure --source ./MiniMax-M2.7 --device cuda -o m27.json
      mq-quant measure --source ./MiniMax-M2.7 --effort imatrix --text corpus.txt -o m27.json
      mq-quant measure --source MiniMaxAI/MiniMax-M2.7 --dry-run
    """
    if effort == "imatrix" and calibration is not None:
        raise typer.BadParameter("--effort imatrix does not look at --calibration: give one of the two")
    if effort == "imatrix" or calibration is not None:
        if judge_tokens and (text or tokens or sequences or length):
            raise typer.BadParameter(
                "moments are not gathered here, and predictions are compared on --judge-tokens: leave --text, "
                "--tokens, --sequences and --length out"
            )
        if sequences and not (text or tokens):
            raise typer.BadParameter(
                "moments are not gathered here: --held-out says on how many sequences predictions are compared, leave "
                "--sequences out"
            )
    with (
        Progress(f"measure {output.name}", quiet) as progress,
        resumable("the same command continues after the last finished layer"),
    ):
        from ...formats.machine import cores
        from ...formats.statistics.moment_folder import open_calibration
        from ..calibrate.tokens import TokenRequest
        from ..encode.encoders import open_encoder
        from ..fit.before import cost_of, measuring_statistics, texts_of
        from ..fit.run import TIER, MeasureOptions
        from ..fit.run import measure as run
        from ..pipeline.statistics import open_imatrix
        from ..spec.places import checked_place, choose_recipe, local_folder
        from ..write.inputs import check_no_input

        chosen = choose_recipe(None if recipe else TIER, recipe, source, revision)
        asked = opt.token_request(text, tokens, sequences, length) or TokenRequest()
        statistics = measuring_statistics(effort, imatrix, calibration, device)
        place, workers = chosen.model.place, jobs or cores()
        inputs = [recipe, text, tokens, judge_tokens, local_folder(place.address), imatrix, calibration]
        check_no_input(output, inputs)
        with (
            checked_place(place.address, place.revision, shard_cache, output.parent) as opened,
            open_encoder(device) as encoder,
        ):
            texts = texts_of(opened, asked, judge_tokens, held_out, effort == "calibrated")
            cost = cost_of(opened, texts, statistics, workers, device)
            if dry_run:
                if imatrix is not None:
                    open_imatrix(imatrix, opened.config)
                if calibration is not None:
                    open_calibration(calibration)
                emit(cost, as_json, _render_cost)
                return
            if not (quiet or as_json):
                note(_render_cost(cost))
            options = MeasureOptions(output, device, workers, encoder, force, restart, progress)
            result = run(chosen, opened, texts, statistics, options)
    show(result, as_json, quiet, _render)


def _render_cost(cost: MeasureCost) -> str:
    gathered = f"calibrated on {cost.tokens:,} tokens, " if cost.tokens else ""
    return (
        f"{gathered}compared on {cost.judged_tokens:,}: about {duration(3600 * cost.hours)}, memory about "
        f"{gigabytes(cost.memory_bytes)}, disk {gigabytes(cost.disk_bytes)} while it works"
    )


def _render(result: MeasureResult) -> str:
    from ..fit.measurement import PROJECTIONS

    found = result.measurement
    rows = []
    for name in found.formats:
        sums = [
            sum(found.loss(layer, projection, name) for layer in range(found.model.layers))
            for projection in PROJECTIONS
        ]
        rows.append((name, *(f"{value:.5f}" for value in (*sums, found.whole[name] - found.rest))))
    return "\n".join(
        (
            f"{printable(str(result.path))}: {len(found.pieces)} pieces of {printable(found.model.name)}",
            "KLD, nats per token: the sums of what each piece adds alone, and what all of them add at once",
            table(("format", "gate and up", "down", "at once"), rows),
            f"everything but the experts, as a file stores it: {found.rest:.5f}",
            f"time         {duration(result.seconds)}",
            f"peak memory  {gigabytes(result.peak_rss_bytes)}",
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {"measure": measure}
