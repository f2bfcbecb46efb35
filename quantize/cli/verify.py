"""The commands that judge files: verify and compare-hidden. Thin, as cli_build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import emit, note, table

if TYPE_CHECKING:
    from ...verify.stages.stage import Stage

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Dump = Annotated[Path, typer.Argument(help="A hidden-state dump (HFHS).", show_default=False)]


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An HFQ file.", show_default=False)],
    source: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from: a folder, or `tiny`.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="For output-weighted SNR. Default: the source's.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Take the bars from this recipe, not the tier's.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Run about this many held-out tokens of the source.")
    ] = 64,
    prompt: Annotated[
        str | None, typer.Option(help="Run this text, and hold its continuation to the coherence gate.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put --prompt through the file's chat template.")
    ] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="Run these token ids: .npy, or text with one sequence per line.")
    ] = None,
    generate: Annotated[
        int, typer.Option(min=0, help="Continue the first sequence by this many tokens.")
    ] = 16,
    backend: Annotated[str, typer.Option(help="auto, hip, cuda or cpu.")] = "auto",
    sample: Annotated[
        bool, typer.Option("--sample", help="Decode and compare a fixed sample of a large file.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots.")] = None,
    dump_hidden: Annotated[Path | None, typer.Option(help="Write the kernels' hidden states (HFHS).")] = None,
    as_json: Json = False,
) -> None:
    """Judge a file: structure, decode parity, fidelity, and a forward pass through the kernels.

    Without a source only structure and decode are judged. The bars are those of the file's tier; the exit code is 1
    where one does not hold.

    \b
    Examples:
      mq-quant verify tiny.mq2-lloyd
      mq-quant verify MiniMax-M2.7.mq2-lloyd --sample
      mq-quant verify MiniMax-M2.7.mq2-lloyd --source ./MiniMax-M2.7 --tokens 512 --report report.html
      mq-quant verify MiniMax-M2.7.mq2-lloyd --prompt 'Why is the sky blue?' --chat --generate 200
    """
    from ...formats.hfq import open_hfq
    from ...kernels.runtime.host import open_backend
    from ...verify.report import check_report, render
    from ...verify.run import verify as run
    from ..inspect.verify_inputs import Wanted, request_of

    if report is not None:
        check_report(report)
    wanted = Wanted(source, imatrix, recipe, tokens, prompt, chat, token_file, sample, generate, dump_hidden)
    with open_hfq(file) as opened, open_backend(backend) as device:
        request = request_of(opened, wanted)
        verdict = run(opened, device, request, lambda stage: note(_line(stage)))
    result = verdict.as_json()
    if report is not None:
        report.write_text(render(result), encoding="utf-8")
    emit(result, as_json, _render)
    verdict.raise_if_failed()


def _line(stage: Stage) -> str:
    return f"{stage.name}: {'ok' if stage.ok else 'FAILED'} ({stage.seen:,} {stage.unit})"


def _render(result: Mapping[str, Any]) -> str:
    stages = {stage["stage"]: stage for stage in result["stages"]}
    rows = [
        (s["stage"], "ok" if s["ok"] else "FAILED", f"{s['seen']:,} {s['unit']}") for s in result["stages"]
    ]
    rows += [(name, "skipped", why) for name, why in result["skipped"].items()]
    parts = [
        f"{result['path']}: {'passed' if result['ok'] else 'FAILED'}",
        table(("stage", "result", "looked at"), rows),
    ]
    said = [f"{s['stage']}: {text}" for s in result["stages"] for text in (*s["problems"], *s["notes"])]
    said += [
        f"{s['stage']}: and {s['problem_count'] - len(s['problems'])} more problems"
        for s in result["stages"]
        if s["problem_count"] > len(s["problems"])
    ]
    if said:
        parts.append("\n".join(said))
    if stages.get("fidelity", {}).get("rows"):
        parts.append(_render_fidelity(stages["fidelity"]))
    if stages.get("forward", {}).get("layers"):
        parts.append(_render_forward(stages["forward"]))
    if "text" in stages.get("generation", {}):
        parts.append(f"continuation: {stages['generation']['text']!r}")
    return "\n\n".join(parts)


def _render_fidelity(stage: Mapping[str, Any]) -> str:
    """One line per projection, over all layers."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in stage["rows"]:
        groups.setdefault((row["projection"].split(".")[-1], row["format"]), []).append(row)
    rows = []
    for (projection, fmt), members in groups.items():
        if fmt in ("F16", "F32"):
            continue
        worst = min(members, key=lambda row: row["worst_db"])
        snr = [row["output_snr_db"] for row in members]
        rows.append(
            (projection, fmt, f"{sum(snr) / len(snr):.2f}", f"{worst['worst_db']:.2f}", worst["worst"])
        )
    return table(("projection", "format", "dB", "worst dB", "worst tensor"), rows)


def _render_forward(stage: Mapping[str, Any]) -> str:
    rows = [
        (r["layer"], f"{r['cosine_mean']:.6f}", f"{r['cosine_min']:.6f}", f"{r['routing']:.4f}")
        for r in stage["layers"]
    ]
    layers = table(("layer", "cosine", "minimum", "routing"), rows)
    kld = (
        f"KLD over {stage['positions']} positions: mean {stage['kld_mean']:.6f}, median {stage['kld_median']:.6f}, "
        f"99 % {stage['kld_p99']:.6f}, max {stage['kld_max']:.6f}; top-1 {stage['top1']:.4f}"
    )
    if stage["ppl_test"] is not None:
        kld += f"; perplexity {stage['ppl_test']:.4f}, the source {stage['ppl_reference']:.4f}"
    return f"{layers}\n{kld}"


def compare_hidden(
    a: Dump,
    b: Dump,
    bar: Annotated[
        float, typer.Option(min=0, max=1, help="The mean cosine that every layer must reach.")
    ] = 0.99,
    as_json: Json = False,
) -> None:
    """Compare two hidden-state dumps of the same tokens, layer by layer.

    \b
    Examples:
      mq-quant compare-hidden ours.hfhs engine.hfhs
      mq-quant compare-hidden ours.hfhs engine.hfhs --bar 0.9995 --json
    """
    from ...formats.errors import CheckError
    from ...verify.hidden import compare_hidden as compare
    from ...verify.hidden import open_hidden

    rows = [vars(row) for row in compare(open_hidden(a), open_hidden(b))]
    under = [row["layer"] for row in rows if not row["cosine_mean"] >= bar]
    emit({"a": str(a), "b": str(b), "bar": bar, "ok": not under, "layers": rows}, as_json, _render_dumps)
    if under:
        raise CheckError(f"the mean cosine of layers {under} is under {bar}", file=a)


def _render_dumps(result: Mapping[str, Any]) -> str:
    rows = [
        (r["layer"], f"{r['cosine_mean']:.6f}", f"{r['cosine_min']:.6f}", f"{r['max_difference']:.3e}")
        for r in result["layers"]
    ]
    return table(("layer", "cosine", "minimum", "largest difference"), rows)


COMMANDS: dict[str, Callable[..., None]] = {"verify": verify, "compare-hidden": compare_hidden}
