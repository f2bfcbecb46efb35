"""The command that judges many files in one pass: evaluate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import gigabytes, note, resumable, show, table
from .progress import Progress

if TYPE_CHECKING:
    from ...verify.model.metrics import DivergenceSummary
    from ..evaluate.reference import Reference
    from ..evaluate.result import Evaluation
    from ..spec.calibration_sizes import WorkSizes

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="HFQ files.", show_default=False)]


def evaluate(
    files: Files,
    source: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint that the files were made from: a folder, a hub repository (owner/name), or `tiny`."
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Compare with these predictions instead: a file of --save-reference, or one that llama-perplexity "
            "wrote with --kl-divergence-base."
        ),
    ] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(help="Save the source's predictions here, so that further files need no source."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the result is written, as JSON.")
    ] = Path("evaluation.json"),
    pictures: Annotated[
        Path | None, typer.Option(help="Draw KLD against size, and the error by layer, into this folder.")
    ] = None,
    text: opt.Text = None,
    tokens: opt.Tokens = None,
    sequences: opt.Sequences = None,
    length: opt.Length = None,
    device: opt.ModelDevice = "cpu",
    revision: Annotated[
        str | None, typer.Option(help="The branch, tag or commit of a hub repository. Default: main.")
    ] = None,
    shard_cache: opt.Shards = 2,
    force: opt.Force = False,
    restart: opt.Restart = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Measure how far files are from their source.

    All files and the source are run on the same text, layer by layer, in one pass: each weight of the source is read
    once. Printed are the KL divergence of the next tokens, agreement and perplexity. The same command continues a run
    that was interrupted, after the last finished layer.

    \b
    Examples:
      mq-quant evaluate tiny.mq2-lloyd --source tiny --sequences 4 --length 128
      mq-quant evaluate m27.mq2 m27.mq3 m27.mq4 --source MiniMaxAI/MiniMax-M2.7 --save-reference m27.reference
      mq-quant evaluate m27.mq2-mini --reference m27.reference -o mini.json
      mq-quant evaluate m27.mq2 --reference llama-base.dat -o gguf.json
    """
    if (source is None) == (reference is None):
        raise typer.BadParameter("give either --source or --reference")
    if reference is not None and (text or tokens or sequences or length or revision):
        raise typer.BadParameter(
            "--reference holds its own tokens: leave --text, --tokens, --sequences, --length and --revision out"
        )
    if reference is not None and save_reference is not None:
        raise typer.BadParameter(
            "--save-reference saves what a source predicts: give --source, not --reference"
        )
    with (
        Progress(f"evaluate {output.name}", quiet) as progress,
        resumable("the same command continues after the last finished layer"),
        ExitStack() as stack,
    ):
        from ...formats.hfq import open_hfq
        from ...formats.hfq.stored import config_of
        from ...formats.own_file import check_folder_place
        from ..calibrate.tokens import TokenRequest
        from ..evaluate.reference import of_checkpoint, of_file
        from ..evaluate.run import EvaluateOptions, evaluate_files
        from ..spec.calibration_sizes import evaluation_sizes
        from ..spec.places import checked_place, local_folder
        from ..write.inputs import check_no_input
        from ..write.outputs import check_output

        asked = opt.token_request(text, tokens, sequences, length) or TokenRequest()
        inputs = [*files, reference, text, tokens, local_folder(source) if source else None]
        for written in filter(None, (output, save_reference)):
            check_no_input(written, inputs)
            check_output(written, force, stream=written is save_reference)
        if pictures is not None:
            check_folder_place(pictures)
        for file in files:  # whatever cannot be used is told before the source is read
            open_hfq(file).close()
        against: Reference
        if reference is not None:
            with open_hfq(files[0]) as first:
                against = of_file(reference, first)
        else:
            assert source is not None
            opened = stack.enter_context(checked_place(source, revision, shard_cache, output.parent))
            against = of_checkpoint(opened, asked, opened.fingerprint(progress))
        if not (quiet or as_json):
            with open_hfq(files[0]) as first:
                models = len(files) + (against.source is not None)
                note(_render_sizes(evaluation_sizes(config_of(first), against.tokens.size, models)))
        options = EvaluateOptions(output, save_reference, device, force, restart, progress)
        result = evaluate_files(files, against, options)
        if pictures is not None:
            from ..evaluate.pictures import pictures_of, write_pictures

            write_pictures(pictures, pictures_of(result.files))
    for text_of_note in result.notes:
        note(text_of_note)
    show(result, as_json, quiet, _render)
    result.raise_if_broken()


def _render_sizes(sizes: WorkSizes) -> str:
    return (
        f"{sizes.tokens:,} tokens: memory about {gigabytes(sizes.memory_bytes)}, "
        f"disk {gigabytes(sizes.disk_bytes)} while it works"
    )


def _render(result: Evaluation) -> str:
    rows = [(printable(f.name), gigabytes(f.bytes), *_cells(f.divergence)) for f in result.files]
    header = (
        "file",
        "size",
        "KLD",
        "±",
        "median",
        "95 %",
        "99 %",
        "99.9 %",
        "max",
        "top-1",
        "top-8",
        "perplexity",
        "±",
    )
    first = result.files[0].divergence
    whose = {"source": "the source", "saved": "the saved source", "llama.cpp": "llama.cpp's reference"}
    tokens = result.tokens
    return "\n".join(
        (
            table(header, rows),
            f"against {whose[result.reference]} (perplexity {first.ppl_reference:.4f} "
            f"± {first.ppl_reference_error:.2g}) at {first.positions:,} positions of {tokens.sequences} sequences "
            f"of {tokens.length} tokens",
        )
    )


def _cells(d: DivergenceSummary) -> tuple[str, ...]:
    klds = (d.kld_mean, d.kld_error, d.kld_median, d.kld_p95, d.kld_p99, d.kld_p999, d.kld_max)
    shares = (f"{d.top1:.4f}", f"{d.top8:.4f}")
    return (*(f"{value:.5f}" for value in klds), *shares, f"{d.ppl_test:.4f}", f"{d.ppl_test_error:.2g}")


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate}
