"""The command that sends finished files to the hub: publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import emit, gigabytes, note, resumable, show, table
from .progress import Progress

if TYPE_CHECKING:
    from ..publish.folder import Listing
    from ..publish.upload import Published


def publish(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="The folder that holds the HFQ files.", show_default=False),
    ],
    repository: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME", help="The hub repository, made where there is none.", show_default=False
        ),
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public. Default: private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent, with its bytes, and ask nobody.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Publish files that do not verify all the same.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="The message of the commits.")] = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Publish a folder of files on the hub.

    The files, their card, checksums, recipes and reports are sent, and nothing that is not listed. What the folder
    lacks of these is made. Files are checked before, and one that does not verify is refused. The same command
    continues an upload that was interrupted.

    \b
    Examples:
      mq-quant publish ./out me/MiniMax-M2.7-hfq --dry-run
      mq-quant publish ./out me/MiniMax-M2.7-hfq
      mq-quant publish ./out me/MiniMax-M2.7-hfq --public
    """
    if len(parts := repository.split("/")) != 2 or not all(parts):
        raise typer.BadParameter("the repository has the form owner/name")
    with (
        Progress(f"publish {repository}", quiet) as progress,
        resumable("the same command continues; what has arrived is kept"),
    ):
        from ..publish.folder import list_folder
        from ..publish.upload import UploadOptions, upload

        listing = list_folder(folder, repository, progress)
        if dry_run:
            emit(listing, as_json, _render_listing, finished=True)
            listing.raise_if_bad()
            return
        if not (quiet or as_json):
            note(_render_listing(listing))
        if not force:
            listing.raise_if_bad()
        result = upload(listing, UploadOptions(public, message), progress)
    show(result, as_json, quiet, _render)


def _render_listing(result: Listing) -> str:
    rows = [
        (item.name, gigabytes(item.size), item.sha256[:16], "made" if item.file is None else "")
        for item in result.items
    ]
    parts = [
        f"to {result.repository}: {len(rows)} files, {gigabytes(result.size)} ({result.size} bytes)",
        table(("file", "size", "sha256", ""), rows),
        *(f"not sent: {line}" for line in result.left_out),
        *(f"note: {line}" for line in result.notes),
        *(f"problem: {line}" for line in result.problems),
    ]
    return "\n".join(parts)


def _render(result: Published) -> str:
    state = "private" if result.private else "public"
    return "\n".join(
        (
            f"{printable(result.address)} ({state})",
            f"sent   {len(result.sent)} files, {gigabytes(result.sent_bytes)}",
            f"there  {len(result.kept)} files already",
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {"publish": publish}
