"""What commands print: results on stdout, as text or as exactly one JSON object; everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import typer

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


class Result(Protocol):
    """What a command gives back."""

    def as_json(self) -> dict[str, Any]:
        """The result as the one JSON object that `--json` prints."""
        ...


R = TypeVar("R", bound="Result | Mapping[str, Any]")


def emit(result: R, as_json: bool, render: Callable[[R], str]) -> None:
    """Print a command's result, with `render` turning it into text for people."""
    if as_json:
        print(json.dumps(_document(result), ensure_ascii=False), flush=True)
    else:
        print(render(result), flush=True)


def _document(result: Result | Mapping[str, Any]) -> Mapping[str, Any]:
    return result if isinstance(result, Mapping) else result.as_json()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def resumable(advice: str) -> Iterator[None]:
    """Ends a command that Ctrl-C reaches with `advice` and exit code 130.

    Where it reaches a lock of Python's that is just being let go, a RuntimeError follows from it and hides it.
    """
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not isinstance(e.__context__, KeyboardInterrupt):
            raise
        note(f"interrupted; {advice}")
        raise typer.Exit(INTERRUPTED) from None


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in plain text: columns that hold only numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = (
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(header)), *map(line, cells)])


def gigabytes(n: int) -> str:
    """Bytes as GB (10⁹) with one digit, or in smaller units where that would say nothing."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"
