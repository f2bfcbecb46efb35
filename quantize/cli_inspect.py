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
    from .inspection import inspect_file, provenance

    if show_provenance:
        emit(provenance(file), as_json, _render_provenance)
    else:
        emit(inspect_file(file, pattern, tensor, groups), as_json, _render_file(pattern is not None))


def _render_provenance(record: Mapping[str, Any]) -> str:
    checksums = record.get("checksums", {}).get("values", "")
    shown = {**record, "checksums": f"{len(checksums) // 16} tensor checksums (--json shows them)"}
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


COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect}
