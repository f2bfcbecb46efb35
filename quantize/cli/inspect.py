"""The commands that look at files: inspect, diff, reproduce, and doctor for the machine. Thin, as cli_build."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import emit, gigabytes, table

File = Annotated[Path, typer.Argument(metavar="FILE", help="An HFQ file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
SHOWN = 8
AFTER = "bytes follow the last tensor"


def inspect(
    file: File,
    pattern: Annotated[
        str | None,
        typer.Option("--filter", help="List the tensors whose name matches this regular expression."),
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(help="Decode this tensor: statistics and first groups.")
    ] = None,
    groups: Annotated[int, typer.Option(min=1, max=64, help="How many groups to show.")] = 2,
    show_provenance: Annotated[
        bool, typer.Option("--provenance", help="Show what the file was made from instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a file's header, metadata and tensors, or one tensor decoded.

    \b
    Examples:
      mq-quant inspect tiny.mq2-lloyd
      mq-quant inspect tiny.mq2-lloyd --filter 'layers\\.0\\..*experts\\.0\\.'
      mq-quant inspect tiny.mq2-lloyd --tensor model.norm.weight --json
      mq-quant inspect tiny.mq2-lloyd --provenance
    """
    from ..inspect.show import inspect_file, provenance

    if show_provenance:
        emit(provenance(file).document, as_json, _render_provenance)
    else:
        emit(inspect_file(file, pattern, tensor, groups), as_json, _render_file(pattern is not None))


def _render_provenance(record: Mapping[str, Any]) -> str:
    from ...formats.hfq.provenance import KEY, Provenance

    count = len(Provenance.read({KEY: record}).checksums)
    shown = {**record, "checksums": f"{count} tensor checksums (--json shows them)"}
    return json.dumps(shown, indent=1, ensure_ascii=False)


def _render_file(listing: bool) -> Callable[[Mapping[str, Any]], str]:
    def render(result: Mapping[str, Any]) -> str:
        header, metadata = result["header"], result["metadata"]
        config = ", ".join(f"{key} {value}" for key, value in metadata["config"].items() if value is not None)
        parts = [
            f"{result['path']}: HFQ version {header['version']}, arch_id {header['arch_id']}, "
            f"{gigabytes(header['total_bytes'])}, payloads from byte {header['data_offset']}",
            f"tier {metadata['tier'] or 'unknown'}, fit {metadata['fit'] or 'unknown'}, "
            f"quantization hash {metadata['quantization_hash'] or 'none'}",
            f"config: {config}",
            *([f"{after} {AFTER}"] if (after := header["trailing_bytes"]) else []),
            table(
                ("format", "tensors", "weights", "size"),
                [
                    (name, s["tensors"], s["weights"], gigabytes(s["bytes"]))
                    for name, s in result["by_format"].items()
                ],
            ),
        ]
        if result["tensor"]:
            parts.append(_render_tensor(result["tensor"]))
        elif listing:
            parts.append(_render_rows(result["tensors"]))
        else:
            parts.append(f"{len(result['tensors'])} tensors; --filter lists them, --tensor decodes one")
        return "\n\n".join(parts)

    return render


def _render_rows(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no tensor matches"
    return table(
        ("name", "format", "shape", "offset", "bytes"),
        [(r["name"], r["format"], "x".join(map(str, r["shape"])), r["offset"], r["bytes"]) for r in rows],
    )


def _render_tensor(tensor: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, tensor["shape"]))
    lines = [f"{tensor['name']}: {tensor['format']} {shape}, {tensor['basis']} basis"]
    lines += [f"  {name:8}{value}" for name, value in tensor["statistics"].items()]
    for i, group in enumerate(tensor["first_groups"]):
        values = " ".join("non-finite" if v is None else f"{v:+.5f}" for v in group[:SHOWN])
        lines.append(f"  group {i}: {values}{' …' if len(group) > SHOWN else ''}")
    return "\n".join(lines)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An HFQ file.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The file to compare with it.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two files: metadata, formats, and each tensor's bytes and values. Exit code 1 where they differ.

    \b
    Examples:
      mq-quant diff tiny.mq2-lloyd tiny.mq3-lloyd
      mq-quant diff before.mq3 after.mq3 --json
    """
    from ..inspect.diff import diff_files

    result = diff_files(a, b)
    emit(result.as_json(), as_json, _render_diff)
    if not result.identical:
        raise typer.Exit(1)


def _render_diff(result: Mapping[str, Any]) -> str:
    if result["identical"]:
        return f"identical: {result['equal_tensors']} tensors and all metadata"
    after = (
        [f"{result[f'trailing_{s}']} {AFTER} of {result[s]}" for s in ("a", "b") if result[f"trailing_{s}"]]
        if not result["same_trailing"]
        else []
    )
    parts = after + [f"{d['key']}: {d['a']!r} / {d['b']!r}" for d in result["metadata"]]
    parts += [f"only in {result[side]}: {name}" for side in ("a", "b") for name in result[f"only_{side}"]]
    if result["different_tensors"]:
        rows = [
            (t["name"], t["format_a"], t["format_b"], "-" if t["snr_db"] is None else f"{t['snr_db']:.2f}")
            for t in result["different_tensors"]
        ]
        parts.append(table(("tensor", "in A", "in B", "SNR of B, dB"), rows))
    parts.append(f"{result['equal_tensors']} tensors equal, {len(result['different_tensors'])} different")
    return "\n".join(parts)


def reproduce(
    file: File,
    source: Annotated[
        str | None, typer.Option(help="The checkpoint, where the file names no repository.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="The imatrix, where the file names no repository.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The calibration folder, where the file was made with one.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Worker threads. Default: one per core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Json = False,
) -> None:
    """Encode again what a file was made from, and compare. Writes nothing; exit code 1 where bytes differ.

    \b
    Examples:
      mq-quant reproduce tiny.mq2-lloyd
      mq-quant reproduce mine.mq3 --source ./MyMiniMax --imatrix imatrix.gguf
    """
    from ...formats.machine import cores
    from ..inspect.reproduce import Inputs
    from ..inspect.reproduce import reproduce as run
    from .progress_bar import Progress

    with Progress(f"reproduce {file.name}", quiet or as_json) as bar:
        result = run(
            file,
            Inputs(source, imatrix, calibration),
            jobs or cores(),
            on_start=bar.start,
            on_done=lambda unit: bar.advance(unit.weights, unit.key),
        ).as_json()
    emit(result, as_json, _render_reproduced)
    if not result["identical"]:
        raise typer.Exit(1)


def _render_reproduced(result: Mapping[str, Any]) -> str:
    if result["identical"]:
        return f"{result['path']}: all {result['tensor_count']} tensors come out the same"
    names = result["different_tensors"]
    lines = [f"{result['path']}: {len(names)} of {result['tensor_count']} tensors differ", *names[:SHOWN]]
    if len(names) > SHOWN:
        lines.append(f"and {len(names) - SHOWN} more (--json lists them)")
    lines.append(f"made by {result['made_by']}, this is {result['this_program']}")
    return "\n".join(lines)


def doctor(as_json: Json = False) -> None:
    """Say what this machine has and what it means. Exit code 1 where something is missing.

    \b
    Examples:
      mq-quant doctor
      mq-quant doctor --json
    """
    from ..inspect.doctor import examine

    result = examine()
    emit(result, as_json, _render_doctor)
    if not result["healthy"]:
        raise typer.Exit(1)


def _render_doctor(result: Mapping[str, Any]) -> str:
    rows = [(f["what"], f["state"], f["found"], f["meaning"]) for f in result["findings"]]
    return f"mq-quant {result['version']}\n" + table(("what", "state", "found", "what it means"), rows)


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "diff": diff,
    "reproduce": reproduce,
    "doctor": doctor,
}
