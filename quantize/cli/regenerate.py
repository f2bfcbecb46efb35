"""The command that makes some layers again: regenerate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import emit, table
from .progress import Progress

if TYPE_CHECKING:
    from ..inspect.regenerate import LayerRow, Regeneration


def regenerate(
    layers: Annotated[
        str | None,
        typer.Option(
            help="The numbers of the layers, with commas between them. Default: the first, one in the middle, the last."
        ),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="A tier; may be given several times. Default: all of them.", autocompletion=opt.tier_names
        ),
    ] = None,
    source: opt.SourceName = None,
    revision: opt.Revision = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="The imatrix, where it is not the recipes' own.")
    ] = None,
    hashes: Annotated[
        Path | None,
        typer.Option(help="The table of hashes to compare with, a JSON file. Default: the one of the model."),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="Take the hashes of a finished file's layers instead of making layers; may be given several times.",
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Put the hashes into the table of --hashes, in place of its own.")
    ] = False,
    shard_cache: opt.Shards = 4,
    jobs: opt.Jobs = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Make some layers of every tier again and compare.

    Their hashes are held against those that are committed beside the recipes, or in a table of your own. The exit code
    is 1 where one differs. Layers are made under an imatrix, for which no other layer is needed.

    \b
    Examples:
      mq-quant regenerate --layers 0,30,61
      mq-quant regenerate --source tiny --tier mq2
      mq-quant regenerate --layers 0 --source ./small --imatrix imatrix.gguf --hashes small.json --write
      mq-quant regenerate --from MiniMax-M2.7.mq2 --hashes layers.json --write
    """
    if write and hashes is None:
        raise typer.BadParameter("--write needs --hashes, the table to write to")
    if files and (layers or tier or source or revision or imatrix):
        raise typer.BadParameter(
            "--from takes the layers, the tier and the source of the files: leave --layers, --tier, --source, "
            "--revision and --imatrix out"
        )
    asked = _numbers(layers)
    with Progress("regenerate", quiet) as progress:
        from ...formats.machine import cores
        from ...formats.own_file import check_place
        from ..inspect.regenerate import Wanted, regenerated_from, write_table
        from ..inspect.regenerate import regenerate as run

        if write and hashes is not None:
            check_place(hashes)
        if files:
            result = regenerated_from(files, hashes)
        else:
            wanted = Wanted(
                asked, tuple(tier or ()), source, revision, imatrix, hashes, jobs or cores(), shard_cache
            )
            result = run(wanted, progress)
        if write and hashes is not None:
            result = write_table(result, hashes)
    emit(result, as_json, _render, finished=True)
    if not result.same and not write:
        raise typer.Exit(1)


def _numbers(layers: str | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    parts = [part.strip() for part in layers.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter("--layers takes numbers with commas between them, such as 0,30,61")
    return tuple(map(int, parts))


def _render(result: Regeneration) -> str:
    rows = [(row.tier, row.layer, row.hash, _verdict(row)) for row in result.rows]
    parts = [table(("tier", "layer", "hash", "compared"), rows)]
    if result.written is not None:
        return "\n".join((*parts, f"{printable(str(result.written))}: {len(rows)} hashes written"))
    wrong = sum(row.differs for row in result.rows)
    parts.append(f"{wrong} of {len(rows)} layers differ" if wrong else f"{len(rows)} layers, none differs")
    if result.unknown:
        parts.append(f"no hash is committed for {result.unknown} of them: --hashes FILE --write keeps these")
    return "\n".join(parts)


def _verdict(row: LayerRow) -> str:
    if row.committed is None:
        return "not committed"
    return f"DIFFERS from {row.committed}" if row.differs else "same"


COMMANDS: dict[str, Callable[..., None]] = {"regenerate": regenerate}
