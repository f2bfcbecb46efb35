"""The commands that look at files and at the machine: inspect, reproduce and doctor."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...formats.text import printable, shown
from . import options as opt
from .console import AFTER, SHOWN, WIDTH, emit, gigabytes, listed, paragraph, table
from .progress import Progress

if TYPE_CHECKING:
    from ...formats.hfq.provenance import Provenance
    from ..inspect.doctor import Examination
    from ..inspect.reproduce import Reproduction
    from ..inspect.show import DecodedTensor, FileSummary, TensorRow


def inspect(
    file: opt.File,
    pattern: Annotated[
        str | None,
        typer.Option("--filter", help="List the tensors whose name holds this regular expression."),
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(help="Decode the tensor of this name: statistics and first groups.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, max=64, help="How many groups of it to show. Default: 2.")
    ] = None,
    show_provenance: Annotated[
        bool, typer.Option("--provenance", help="Show instead what the file was made from.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Show what is in a file.

    Its header, metadata and tensors, one tensor decoded, or what the file was made from.

    \b
    Examples:
      mq-quant inspect tiny.mq2-lloyd
      mq-quant inspect tiny.mq2-lloyd --filter 'layers\\.0\\..*experts\\.0\\.'
      mq-quant inspect tiny.mq2-lloyd --tensor model.norm.weight --json
      mq-quant inspect tiny.mq2-lloyd --provenance
    """
    from ..inspect.show import inspect_file, provenance

    if show_provenance and (pattern is not None or tensor is not None or groups):
        raise typer.BadParameter("--provenance is shown alone: leave --filter, --tensor and --groups out")
    if groups and tensor is None:
        raise typer.BadParameter("--groups goes with --tensor")
    if show_provenance:
        emit(provenance(file), as_json, _render_provenance)
    else:
        emit(inspect_file(file, pattern, tensor, groups or 2), as_json, _render_file(pattern is not None))


def _render_provenance(provenance: Provenance) -> str:
    checksums = f"{len(provenance.checksums)} tensor checksums (--json shows them)"
    return json.dumps({**provenance.document, "checksums": checksums}, indent=1, ensure_ascii=False)


def _render_file(listing: bool) -> Callable[[FileSummary], str]:
    def render(result: FileSummary) -> str:
        from ..spec.by_layer import formats_by_layer

        header, metadata = result.header, result.metadata
        config = ", ".join(f"{k} {_value(v)}" for k, v in metadata.config.items() if v is not None)
        parts = [
            f"{printable(str(result.path))}: HFQ version {header.version}, arch_id {header.arch_id}, "
            f"{gigabytes(header.total_bytes)}, payloads from byte {header.data_offset}",
            f"tier {_value(metadata.tier)}, fit {_value(metadata.fit)}, "
            f"quantization hash {_value(metadata.quantization_hash, 'none')}",
            f"config: {config or 'none of the known keys'}",
            table(
                ("format", "tensors", "weights", "size"),
                [(name, s.tensors, s.weights, gigabytes(s.bytes)) for name, s in result.by_format.items()],
            ),
        ]
        experts = {"gate and up": result.gate_up, "down": result.down}
        if any(len(set(formats.values())) > 1 for formats in experts.values()):
            lines = (f"{what}: {formats_by_layer(formats)}" for what, formats in experts.items())
            parts.append("\n".join(map(paragraph, lines)))
        if header.trailing_bytes:
            parts.append(f"{header.trailing_bytes} {AFTER}; mq-quant does not read them")
        if result.tensor:
            parts.append(_render_tensor(result.tensor))
        if listing:
            parts.append(_render_rows(result.tensors))
        elif not result.tensor:
            parts.append(f"{len(result.tensors)} tensors; --filter lists them, --tensor decodes one")
        return "\n\n".join(parts)

    return render


def _value(value: Any, missing: str = "unknown") -> str:
    """A value from a file's metadata, of any type, on one line."""
    if value is None:
        return missing
    return printable(value) if isinstance(value, str) and len(value) <= WIDTH else shown(value)


def _render_rows(rows: tuple[TensorRow, ...]) -> str:
    if not rows:
        return "no tensor matches"
    return table(
        ("name", "format", "shape", "offset", "bytes"),
        [(r.name, r.format, "x".join(map(str, r.shape)), r.offset, r.bytes) for r in rows],
    )


def _render_tensor(tensor: DecodedTensor) -> str:
    row = tensor.row
    lines = [f"{row.name}: {row.format} {'x'.join(map(str, row.shape))}, {tensor.basis} basis"]
    lines += [f"  {name:8}{value}" for name, value in vars(tensor.statistics).items()]
    for i, group in enumerate(tensor.first_groups):
        values = " ".join("non-finite" if v is None else f"{v:+.5f}" for v in group[:SHOWN])
        lines.append(f"  group {i}: {values}{' …' if len(group) > SHOWN else ''}")
    return "\n".join(lines)


def reproduce(
    file: opt.File,
    source: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint. Needed where the file names no repository that this program knows."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="The imatrix. Needed where the file names no repository that this program knows."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The calibration folder, where the file was made with one.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="The text that the build was calibrated on, where it was not our own."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="The token ids that the build was calibrated on, a .npy file.")
    ] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="How many sequences of them.")] = None,
    length: opt.Length = None,
    device: Annotated[
        opt.TorchDevice,
        typer.Option(
            help="Where the model runs on these tokens; on another device than the build's bytes differ."
        ),
    ] = "cpu",
    jobs: opt.Jobs = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Make a file again and compare.

    What the file says it was made from is encoded again. Nothing is written. The exit code is 1 where bytes differ.

    \b
    Examples:
      mq-quant reproduce tiny.mq2-lloyd
      mq-quant reproduce mine.mq3 --source ./MyMiniMax --imatrix imatrix.gguf
    """
    with Progress(f"reproduce {file.name}", quiet) as progress:
        from ...formats.machine import cores
        from ..inspect.reproduce import Inputs
        from ..inspect.reproduce import reproduce as run

        asked = opt.token_request(text, tokens, sequences, length)
        result = run(
            file, Inputs(source, imatrix, calibration, asked, device), jobs or cores(), watch=progress
        )
    emit(result, as_json, _render_reproduced, finished=True)
    if not result.identical:
        raise typer.Exit(1)


def _render_reproduced(result: Reproduction) -> str:
    path = printable(str(result.path))
    if result.identical:
        if not result.tuned_tensors:
            return f"{path}: all {result.tensor_count} tensors come out the same"
        return (
            f"{path}: {result.tensor_count - result.tuned_tensors} tensors come out the same, and so do the codes of "
            f"the experts in the other {result.tuned_tensors}; their levels, norms and attention were tuned after "
            "that, and were not compared"
        )
    names = result.different_tensors
    return "\n".join(
        (
            f"{path}: {len(names)} of {result.tensor_count} tensors differ",
            *listed(names, "--json lists them"),
            f"made by version {_made_by(result.made_by)}, this is version {_made_by(result.this_program)}",
        )
    )


def _made_by(program: Mapping[str, Any]) -> str:
    commit = program.get("commit")
    return f"{_value(program.get('version'))}{f' of commit {_value(commit)}' if commit else ''}"


def doctor(as_json: opt.Json = False) -> None:
    """Look at this machine.

    Each line says what was found and what that means for mq-quant. The exit code is 1 where something is missing.

    \b
    Examples:
      mq-quant doctor
      mq-quant doctor --json
    """
    from ..inspect.doctor import examine

    result = examine()
    emit(result, as_json, _render_doctor, finished=True)
    if not result.healthy:
        raise typer.Exit(1)


def _render_doctor(result: Examination) -> str:
    """Each finding: what it is about, its state, what was found, and below that what it means."""
    first = max(len(finding.what) for finding in result.findings) + 2
    second = max(len(finding.state) for finding in result.findings) + 2
    lines = [f"mq-quant {result.version}"]
    for finding in result.findings:
        head = finding.what.ljust(first) + finding.state.ljust(second)
        lines += _wrapped(printable(finding.found), head, " " * len(head))
        lines += _wrapped(finding.meaning, " " * len(head), " " * len(head))
    return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=others) or [first.rstrip()]


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "reproduce": reproduce,
    "doctor": doctor,
}
