"""An output that is one of its own inputs is refused: writing it would destroy what it is made from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...formats.errors import OutputError
from ...formats.hfq.layout import MAGIC


def check_no_input(output: Path, inputs: Iterable[Path | None]) -> None:
    """OutputError where a file at `output` is one of `inputs`, or lies in one of them that is a folder.

    Files for the engine may lie in a folder of inputs: none is made from such a file.
    """
    for each in inputs:
        if each is not None and _is_in(output, each):
            raise OutputError(
                "is an input of this command, which the output would replace",
                file=output,
                hint="give the output another name",
            )


def _is_in(output: Path, given: Path) -> bool:
    try:
        if given.is_dir():
            return output.parent.samefile(given) and output.is_file() and not _is_ours(output)
        return output.samefile(given)
    except OSError:  # one of them is not there, or cannot be looked at
        return False


def _is_ours(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(len(MAGIC)) == MAGIC
