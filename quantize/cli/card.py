"""The command that writes what stands beside published files: card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import note, show
from .evaluate import Files
from .progress import Progress

if TYPE_CHECKING:
    from ..publish.card import CardResult


def card(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What `mq-quant evaluate` wrote of these files: the table and picture of KLD."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Take the licence from the card of this folder or repository. Default: the files' source."
        ),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="The licence, in place of what the base model declares.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option(help="The name of a licence that the hub does not list.")
    ] = None,
    license_link: Annotated[str | None, typer.Option(help="Where the licence can be read.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that exists.")] = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Write the model card of files of one model.

    README.md begins with the hub's header, and says what each file is for, which memory it fits, how far it is from the
    source, how it is run, and how it was made. SHA256SUMS and the pictures stand beside it.

    \b
    Examples:
      mq-quant card tiny.mq2-lloyd --output card
      mq-quant card m27.mq2 m27.mq3 m27.mq4 --evaluation evaluation.json --output m27
      mq-quant card small.mq3 --base ./small --license apache-2.0 --output small-card
    """
    with Progress(f"card {output.name}", quiet) as progress:
        from ..publish.card import CardOptions, write_card

        options = CardOptions(evaluation, base, license_id, license_name, license_link, force)
        result = write_card(files, output, options, progress)
    for text in result.notes:
        note(text)
    show(result, as_json, quiet, _render)


def _render(result: CardResult) -> str:
    written = [result.readme, result.sums, *(result.folder / name for name in result.pictures)]
    return "\n".join(printable(str(path)) for path in written)


COMMANDS: dict[str, Callable[..., None]] = {"card": card}
