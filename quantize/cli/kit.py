"""The command for authors of engines: kit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import emit, gigabytes, show
from .progress import Progress

if TYPE_CHECKING:
    from ..publish.kit.make import KitResult
    from ..publish.kit.run import CheckedKit


def kit(
    out: Annotated[Path | None, typer.Option(help="Make a kit in this folder.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Run our own kernels over the kit in this folder, and judge them.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="With --check: keep what the kernels gave in this folder.")
    ] = None,
    backend: Annotated[
        opt.Backend, typer.Option(help="What runs the kernels. `auto` takes a GPU where there is one.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a kit that exists.")] = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Make a conformance kit for engines.

    A kit holds small models of full width, what they must give, single products, and check_kit.py, which needs no
    package and says where an engine departs. Its README.md tells authors of engines what to do. The exit code of
    --check is 1 where something departs.

    \b
    Examples:
      mq-quant kit --out kit
      mq-quant kit --check kit --backend cuda
    """
    if (out is None) == (check is None):
        raise typer.BadParameter("give either --out or --check")
    if results is not None and check is None:
        raise typer.BadParameter("--results goes with --check")
    if force and out is None:
        raise typer.BadParameter("--force goes with --out")
    if out is not None:
        _make(out, backend, force, quiet, as_json)
    elif check is not None:
        with tempfile.TemporaryDirectory(prefix="mq-quant-") as scratch:
            _check(check, results or Path(scratch), backend, quiet, as_json)


def _make(out: Path, backend: opt.Backend, force: bool, quiet: bool, as_json: bool) -> None:
    with Progress(f"kit {out.name}", quiet) as progress:
        from ...kernels.runtime.host import open_backend
        from ..publish.kit.make import write_kit

        with open_backend(backend) as device:
            made = write_kit(out, device, force=force, watch=progress)
    show(made, as_json, quiet, _render_made)


def _check(kit: Path, results: Path, backend: opt.Backend, quiet: bool, as_json: bool) -> None:
    with Progress(f"kit {kit.name}", quiet) as progress:
        from ...kernels.runtime.host import open_backend
        from ..publish.kit.run import check_kit

        with open_backend(backend) as device:
            checked = check_kit(kit, results, device, progress)
    emit(checked, as_json, _render_checked, finished=True)
    checked.raise_if_failed()


def _render_made(result: KitResult) -> str:
    count = len(result.models)
    return (
        f"{printable(str(result.folder))}: {count} models, {gigabytes(result.bytes)} in {result.files} files"
    )


def _render_checked(result: CheckedKit) -> str:
    found = [f"{finding.where}: {finding.problem}" for finding in result.judgement.findings]
    count = len(result.judgement.judged)
    end = f"{len(found)} departures" if found else "all are right"
    return "\n".join((*found, f"{result.device}: {count} results judged, {end}"))


COMMANDS: dict[str, Callable[..., None]] = {"kit": kit}
