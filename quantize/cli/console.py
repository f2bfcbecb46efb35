"""What commands print: results on stdout, as text or as exactly one JSON object; everything else on stderr.

Text may hold names and values from files of strangers. No control character of theirs reaches the terminal.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import typer

from ...formats.errors import MqError
from ...formats.strictjson import finite
from ...formats.text import printable
from .events import EventStream, event_line
from .guard import InterruptError, MachineError, UsageError
from .streams import READER_GONE, silence

WIDTH = 100
"""Columns of running text."""
SHOWN = 8
"""Lines of a long list that are printed; --json prints all of them."""
AFTER = "bytes follow the last tensor"


class Result(Protocol):
    """What a command gives back."""

    def as_json(self) -> dict[str, Any]:
        """The result as the one JSON object that `--json` prints."""
        ...


R = TypeVar("R", bound=Result)


def emit(result: R, as_json: bool, render: Callable[[R], str], *, finished: bool = False) -> None:
    """Print a command's result, with `render` turning it into text for people.

    A command that is `finished` has done its work or reached its verdict: it goes on though nobody reads the result.
    Any other ends, without a word, as soon as its reader has left. Raises MachineError where stdout cannot be written,
    as on a full disk: what was asked for is not there then.
    """
    text = json_text(result.as_json()) if as_json else printable(render(result), keep="\n")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        silence(sys.stdout)
        if not finished:
            raise typer.Exit(READER_GONE) from None
    except OSError as e:
        raise unprintable("the result", e) from None


def unprintable(what: str, fault: OSError) -> MachineError:
    """The error for what does not get to stdout, which is silent from now on."""
    silence(sys.stdout)
    return MachineError(
        f"{what} cannot be printed: {fault.strerror}",
        hint="see where stdout goes, and whether its disk is full",
    )


def show(result: R, as_json: bool, quiet: bool, render: Callable[[R], str]) -> None:
    """Print the result of finished work, unless it is to be quiet; `--json` asks for it all the same.

    The work stands in a file: text about it that cannot be printed is told of and ends nothing, a JSON object is an
    error.
    """
    if quiet and not as_json:
        return
    try:
        emit(result, as_json, render, finished=True)
    except MachineError as e:
        if as_json:
            raise
        note(e.problem)


def json_text(document: dict[str, Any]) -> str:
    """A document as strict JSON on one line. Numbers that JSON lacks become null, unprintable characters escapes."""
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    except ValueError:
        document = finite(document)
        text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return text if unicode and text.isprintable() else json.dumps(document)


def note(text: str) -> None:
    """Print a message on stderr, above a progress bar that is drawn there. May be called on any thread.

    A stderr that nobody reads does not end a command.
    """
    text = printable(text, keep="\n")
    if isinstance(sys.stderr, EventStream):
        sys.stderr.event("note", text=text)
        return
    with suppress(OSError):
        if "tqdm" not in sys.modules:  # it takes time to import, and without it no bar is drawn
            print(text, file=sys.stderr, flush=True)
            return
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def complain(error: MqError, as_json: bool) -> None:
    """Print an error on stderr: a sentence, or one JSON object where the command speaks JSON."""
    if isinstance(sys.stderr, EventStream):
        sys.stderr.event("error", **error.as_json())
    elif as_json:
        with suppress(OSError):
            print(event_line("error", error.as_json()), file=sys.stderr, flush=True)
    else:
        note(_sentence(error))


def _sentence(error: MqError) -> str:
    match error:
        case UsageError():
            return error.shown
        case InterruptError():
            return f"{error.problem}; {error.hint}" if error.hint else error.problem
        case _:
            return f"error: {error}"


@contextmanager
def resumable(advice: str) -> Iterator[None]:
    """Ends a command that Ctrl-C reaches with InterruptError, whose hint is `advice`.

    Ctrl-C that comes while one of Python's locks is being released shows as a RuntimeError, with the KeyboardInterrupt
    as its context.
    """
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not isinstance(e.__context__, KeyboardInterrupt):
            raise
        raise InterruptError(advice) from None


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in plain text: columns that hold only numbers are aligned to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = (
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(header)), *map(line, cells)])


def paragraph(text: str, indent: str = "") -> str:
    """A text broken into lines of at most WIDTH columns, those after the first indented."""
    return "\n".join(textwrap.wrap(text, WIDTH, subsequent_indent=indent))


def listed(items: Sequence[str], more: str) -> list[str]:
    """The first lines of a long list; a last one says how many are left out, and `more` where they are shown."""
    left = len(items) - SHOWN
    return [*items[:SHOWN], f"and {left} more ({more})"] if left > 0 else list(items)


def gigabytes(n: int) -> str:
    """Bytes as GB (10⁹) with one digit, or in smaller units where that would say nothing."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def amount(n: float, unit: str) -> str:
    """A number of units, in thousands, millions or milliards where it is large; bytes as `gigabytes` has them."""
    if unit == "bytes":
        return gigabytes(round(n))
    for prefix, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if n >= size:
            return f"{n / size:.1f}{prefix} {unit}"
    return f"{n:.3g} {unit}" if n < 10 else f"{n:.0f} {unit}"


def duration(seconds: float) -> str:
    """A time in words, in the unit in which it is a small number."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36000 else f"{seconds / 3600:.0f} h"


def coverage(share: float | None) -> str:
    """How many of the experts the statistics have seen."""
    return "no importances" if share is None else f"{share:.1%} of the experts"
