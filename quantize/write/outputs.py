"""Files of results that cannot be written are refused before the work that they are of. Nothing is touched here."""

from __future__ import annotations

from pathlib import Path

from ...formats.errors import OutputError
from ...formats.own_file import check_place, disk_errors, free_bytes, is_stream


def check_output(path: Path, force: bool, *, stream: bool = False) -> None:
    """OutputError where the output exists, or cannot be written; with `stream` it may be a pipe as in `check_place`."""
    check_place(path, stream=stream)
    if path.exists() and not (force or is_stream(path)):
        raise OutputError("exists already", file=path, hint="give --force to replace it, or another name")


def check_work_fits(path: Path, needed: int, less: str) -> None:
    """OutputError where so many bytes of work do not fit on the output's disk; `less` is the option that saves some."""
    with disk_errors(path):
        free = free_bytes(path.parent)
    if free is not None and free < needed:
        raise OutputError(
            f"the work needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free",
            file=path,
            hint=f"free some space, give --output on another disk, or ask for less with {less}",
        )
