"""The command that compares two files: diff."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable, shown
from . import options as opt
from .console import AFTER, SHOWN, emit, listed, table

if TYPE_CHECKING:
    from ..inspect.diff import Diff, TensorDiff

_PLACE = re.compile(r"^model\.layers\.\d+\.|(?<=experts)\.\d+|\.weight$")
"""What the names of tensors of one kind do not share: layer and expert."""


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An HFQ file.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The file to compare with it.", show_default=False)],
    everything: Annotated[
        bool, typer.Option("--all", help="List every tensor and every key that differs, not a summary.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Compare two files.

    Metadata, formats, and each tensor's bytes and values are compared. The exit code is 1 where they differ.

    \b
    Examples:
      mq-quant diff tiny.mq2-lloyd tiny.mq3-lloyd
      mq-quant diff tiny.mq2-lloyd tiny.mq3-lloyd --all
      mq-quant diff before.mq3 after.mq3 --json
    """
    from ..inspect.diff import diff_files

    result = diff_files(a, b)
    emit(result, as_json, _whole if everything else _summary, finished=True)
    if not result.identical:
        raise typer.Exit(1)


def _summary(result: Diff) -> str:
    """What fits on a screen: the first keys and names, and one line for all tensors of a kind."""
    return _render(result, 40, _kinds, lambda lines: listed(lines, "--all shows them"))


def _whole(result: Diff) -> str:
    return _render(result, 300, _tensors, list)


def _render(
    result: Diff,
    length: int,
    tensors: Callable[[Sequence[TensorDiff]], str],
    some: Callable[[list[str]], list[str]],
) -> str:
    """The parts of a diff; values are cut to about `length` characters."""
    if result.identical:
        return f"identical: {result.equal_tensors} tensors and all metadata"
    parts = []
    if not result.same_trailing:
        after = (result.trailing_a, result.a), (result.trailing_b, result.b)
        parts += [f"{count} {AFTER} of {printable(str(path))}" for count, path in after if count]
    values = [(printable(d.key), shown(d.a, length), shown(d.b, length)) for d in result.metadata]
    parts += some([f"{key}: {a} / {b}" for key, a, b in values])
    for path, names in ((result.a, result.only_a), (result.b, result.only_b)):
        parts += some([f"only in {printable(str(path))}: {name}" for name in names])
    if result.different_tensors:
        parts.append(tensors(result.different_tensors))
    parts += some([f"damaged in {printable(path)}: {name}" for path, name in result.damaged])
    if not result.same_order:
        parts.append("the tensors that both have stand in another order")
    parts.append(f"{result.equal_tensors} tensors equal, {len(result.different_tensors)} different")
    return "\n".join(parts)


def _tensors(rows: Sequence[TensorDiff]) -> str:
    return table(
        ("tensor", "in A", "in B", "SNR of B, dB"),
        [(t.name, t.format_a, t.format_b, _db(t.snr_db)) for t in rows],
    )


def _kinds(rows: Sequence[TensorDiff]) -> str:
    """Tensors that differ in layer and expert alone, together: how many, and the mean and least signal to noise."""
    kinds: dict[tuple[str, str, str], list[float | None]] = {}
    for t in rows:
        kinds.setdefault((_PLACE.sub("", t.name), t.format_a, t.format_b), []).append(t.snr_db)
    lines = [(*kind, len(found), *_range(found)) for kind, found in kinds.items()]
    text = table(("tensors", "in A", "in B", "count", "SNR of B, dB", "least"), lines[: 2 * SHOWN])
    return text + _more(len(lines) - 2 * SHOWN)


def _more(left: int) -> str:
    return f"\nand {left} more kinds (--all shows every tensor)" if left > 0 else ""


def _range(found: Sequence[float | None]) -> Iterator[str]:
    """The mean and the least of those that could be compared."""
    known = [value for value in found if value is not None]
    yield _db(sum(known) / len(known) if known else None)
    yield _db(min(known, default=None))


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


COMMANDS: dict[str, Callable[..., None]] = {"diff": diff}
