"""The commands that judge files: verify and compare-hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import emit, note, table
from .progress import Progress

if TYPE_CHECKING:
    from ...verify.hidden import HiddenComparison
    from ...verify.run import Verification
    from ...verify.stages.fidelity import FidelityFigures
    from ...verify.stages.predictions import PredictionFigures
    from ...verify.stages.stage import StageResult

Dump = Annotated[Path, typer.Argument(help="A dump of hidden states (HFHS).", show_default=False)]


def verify(
    file: opt.File,
    source: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint that the file was made from: a folder, a hub repository (owner/name), or `tiny`."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="The imatrix by which errors are weighed. Default: imatrix.gguf of the source."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Take the bars from this recipe instead of the file's tier.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Judge by about this many positions, fewer than 512 only where this says so: of eval_tokens.npy "
            "beside the source, else of our own evaluation text. Default: 512.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Run this text instead. Its continuation must be coherent."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put --prompt into the file's chat template, as a user's message.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Run these token ids instead: a .npy file, or text with one sequence on each line."
        ),
    ] = None,
    generate: Annotated[
        int, typer.Option(min=0, help="Continue the first sequence by this many tokens.")
    ] = 16,
    backend: Annotated[
        opt.Backend, typer.Option(help="What runs the kernels. `auto` takes a GPU where there is one.")
    ] = "auto",
    sample: Annotated[
        bool, typer.Option("--sample", help="Look at a fixed sample of the tensors, for large files.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the result with plots to this HTML file.")
    ] = None,
    dump_hidden: Annotated[
        Path | None, typer.Option(help="Write the kernels' hidden states to this file (HFHS).")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="The branch, tag or commit of a hub repository. Default: main.")
    ] = None,
    shard_cache: opt.Shards = 2,
    as_json: opt.Json = False,
) -> None:
    """Judge a file.

    Its structure is checked, it is decoded and run by the kernels, and its weights and predictions are compared with
    those of the checkpoint. Without a checkpoint the latter is left out. The bars are those of the file's tier,
    or of the largest tier whose formats are nowhere larger than the file's. The exit code is 1 where one of them is
    missed.

    \b
    Examples:
      mq-quant verify tiny.mq2-lloyd
      mq-quant verify MiniMax-M2.7.mq2-lloyd --sample
      mq-quant verify MiniMax-M2.7.mq2-lloyd --source ./MiniMax-M2.7 --tokens 1024 --report report.html
      mq-quant verify MiniMax-M2.7.mq2-lloyd --prompt 'Why is the sky blue?' --chat --generate 200
    """
    if chat and prompt is None:
        raise typer.BadParameter("--chat goes with --prompt")
    if prompt is not None and token_file is not None:
        raise typer.BadParameter("give either --prompt or --token-file")
    if tokens == 0 and (prompt is not None or token_file is not None or dump_hidden is not None):
        raise typer.BadParameter(
            "--tokens 0 runs nothing: leave --prompt, --token-file and --dump-hidden out"
        )
    with Progress(f"verify {file.name}") as progress:
        from ...formats.hfq import open_hfq
        from ...formats.own_file import check_place
        from ...kernels.runtime.host import open_backend
        from ...verify.report import render
        from ...verify.run import verify as run
        from ..inspect.verify_inputs import VerifyOptions, inputs_of
        from ..spec.places import local_folder
        from ..write.atomic import write_result
        from ..write.inputs import check_no_input

        for written in filter(None, (report, dump_hidden)):
            inputs_given = file, imatrix, recipe, token_file, local_folder(source) if source else None
            check_place(written, stream=True)
            check_no_input(written, inputs_given)
        options = VerifyOptions(
            source,
            imatrix,
            recipe,
            tokens,
            prompt,
            chat,
            token_file,
            sample,
            generate,
            dump_hidden,
            revision,
            shard_cache,
        )
        with (
            open_hfq(file) as opened,
            open_backend(backend) as device,
            closing(inputs_of(opened, options)) as inputs,
        ):
            result = run(opened, device, inputs, lambda stage: note(_line(stage)), progress)
        if report is not None:
            write_result(report, [memoryview(render(result).encode())])
    emit(result, as_json, _render, finished=True)
    result.raise_if_failed()


def _line(stage: StageResult) -> str:
    return f"{stage.name}: {'ok' if stage.ok else 'FAILED'} ({stage.seen:,} {stage.unit})"


def _render(result: Verification) -> str:
    from ...verify.stages.fidelity import FidelityFigures
    from ...verify.stages.generation import Continuation
    from ...verify.stages.predictions import PredictionFigures
    from ...verify.stages.stage import LISTED

    rows = [(s.name, "ok" if s.ok else "FAILED", f"{s.seen:,} {s.unit}") for s in result.stages]
    rows += [(name, "skipped", why) for name, why in result.skipped.items()]
    parts = [
        f"{printable(str(result.path))}: {'passed' if result.ok else 'FAILED'}",
        table(("stage", "result", "looked at"), rows),
    ]
    said = [f"{s.name}: {printable(t)}" for s in result.stages for t in (*s.complaints[:LISTED], *s.notes)]
    said += [
        f"{s.name}: and {len(s.complaints) - LISTED} more problems"
        for s in result.stages
        if len(s.complaints) > LISTED
    ]
    if said:
        parts.append("\n".join(said))
    if (fidelity := result.figures(FidelityFigures)) and fidelity.rows:
        parts.append(_render_fidelity(fidelity))
    if predictions := result.figures(PredictionFigures):
        parts.append(_render_predictions(predictions))
    if (made := result.figures(Continuation)) and made.text is not None:
        parts.append(f"continuation: {printable(repr(made.text))}")
    return "\n\n".join(parts)


def _render_fidelity(figures: FidelityFigures) -> str:
    """One line for each projection, over all layers."""
    groups: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for row in figures.rows:
        key = row.projection.split(".")[-1], row.format
        groups.setdefault(key, []).append((row.worst_db, row.output_snr_db, row.worst))
    rows = []
    for (projection, fmt), members in groups.items():
        if fmt in ("F16", "F32"):
            continue
        worst_db, _, worst = min(members)
        mean = sum(snr for _, snr, _ in members) / len(members)
        rows.append((projection, fmt, f"{mean:.2f}", f"{worst_db:.2f}", worst))
    return table(("projection", "format", "dB", "worst dB", "worst tensor"), rows)


def _render_predictions(figures: PredictionFigures) -> str:
    rows = [
        (r.layer, f"{r.cosine_mean:.6f}", f"{r.cosine_min:.6f}", f"{r.routing:.4f}") for r in figures.layers
    ]
    layers = table(("layer", "cosine", "minimum", "routing"), rows)
    d = figures.divergence
    kld = (
        f"KLD over {figures.positions} positions: mean {d.kld_mean:.6f} ± {d.kld_error:.2g}, "
        f"median {d.kld_median:.6f}, 99 % {d.kld_p99:.6f}, max {d.kld_max:.6f}; top-1 {d.top1:.4f}"
    )
    if math.isfinite(d.ppl_test) and math.isfinite(d.ppl_reference):
        kld += f"; perplexity {d.ppl_test:.4f}, the source {d.ppl_reference:.4f}"
    return f"{layers}\n{kld}"


def compare_hidden(
    a: Dump,
    b: Dump,
    bar: Annotated[
        float, typer.Option(min=0, max=1, help="The mean cosine that every layer must reach.")
    ] = 0.99,
    as_json: opt.Json = False,
) -> None:
    """Compare two dumps of hidden states.

    Both must be of the same tokens. The exit code is 1 where a layer is under the bar. Where one of them is what a
    model of a conformance kit must give (`mq-quant kit`), the fault that the other shows is named.

    \b
    Examples:
      mq-quant compare-hidden ours.hfhs engine.hfhs
      mq-quant compare-hidden ours.hfhs engine.hfhs --bar 0.9995 --json
      mq-quant compare-hidden kit/mq4/eight.hfhs engine.hfhs
    """
    from ...verify.hidden import compare_dumps
    from ..publish.kit.compare import with_kit

    result = with_kit(compare_dumps(a, b, bar))
    emit(result, as_json, _render_dumps, finished=True)
    result.raise_if_failed()


def _render_dumps(result: HiddenComparison) -> str:
    rows = [
        (r.layer, f"{r.cosine_mean:.6f}", f"{r.cosine_min:.6f}", f"{r.max_difference:.3e}")
        for r in result.layers
    ]
    return table(("layer", "cosine", "minimum", "largest difference"), rows)


COMMANDS: dict[str, Callable[..., None]] = {"verify": verify, "compare-hidden": compare_hidden}
