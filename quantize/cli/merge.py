"""The command that puts parts of a build together: merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import gigabytes, resumable, show
from .progress import Progress

if TYPE_CHECKING:
    from ..pipeline.merge import MergeResult


def merge(
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART...", help="Parts that `build --part` or `--layers` made.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)],
    force: opt.Force = False,
    restart: opt.Restart = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Put the parts of a build together.

    The result is the file that one machine would have made, byte for byte. Parts may come in any order; all layers of
    the model have to be there once. The same command continues a merge that was interrupted.

    \b
    Examples:
      mq-quant merge m27.mq3.layers-* -o MiniMax-M2.7.mq3
      mq-quant merge first.part second.part -o MiniMax-M2.7.mq3 --json
    """
    from ..pipeline.merge import merge_parts

    with (
        Progress(f"merge {output.name}", quiet) as progress,
        resumable("the same command continues the merge, with --restart it begins anew"),
    ):
        result = merge_parts(parts, output, force, restart, progress)
    show(result, as_json, quiet, _render)


def _render(result: MergeResult) -> str:
    size = f"{gigabytes(result.total_bytes)} in {result.tensor_count} tensors, of {result.parts} parts"
    return "\n".join(
        (
            f"{printable(str(result.path))}: {size}",
            f"quantization hash  {result.quantization_hash}",
            f"time               {result.seconds:.1f} s",
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {"merge": merge}
