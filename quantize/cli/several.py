"""Several tiers in one command: which were asked for, what became of each, and what all of them take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ...formats.text import printable
from .console import complain, coverage, gigabytes, listed, paragraph, show, table

if TYPE_CHECKING:
    from ..pipeline.tiers import TierResult, TierResults


def asked_tiers(tiers: Sequence[str] | None, everything: bool, recipe: Path | None) -> tuple[str, ...]:
    """The tiers of --tier and --all-tiers, none where neither is given."""
    if not everything:
        return tuple(tiers or ())
    if tiers or recipe:
        raise typer.BadParameter("--all-tiers names every tier already: leave --tier and --recipe out")
    from ..spec.recipe import tiers as names

    return tuple(names())


def folder_of(tiers: Sequence[str], output: Path | None, folder: Path | None, alone: object) -> Path | None:
    """The folder that files of several tiers are written to, or one tier's where a folder is asked for; None for one
    file. `alone` is whether an option is given that goes with a single file.
    """
    if len(tiers) < 2 and folder is None:
        return None
    if output is not None:
        raise typer.BadParameter(
            "--output names one file: give --output-dir FOLDER, where each tier's file gets its default name"
        )
    if alone:
        raise typer.BadParameter(
            "--part, --layers, --ray and budgets make one file: give one --tier, without --output-dir"
        )
    return folder or Path()


def show_results(results: TierResults, as_json: bool, quiet: bool) -> None:
    """Print what became of each tier; the errors of those that failed follow on stderr, and set the exit code."""
    show(results, as_json, quiet, lambda made: "\n".join(_rendered(made)))
    for each in results.failed:
        assert each.error is not None
        complain(each.error, as_json)
    for each in results.failed[:1]:
        assert each.error is not None
        raise typer.Exit(each.error.exit_code)


def _rendered(results: TierResults) -> Iterator[str]:
    yield table(("tier", "file", "size", "quantization hash", "what became of it"), map(_row, results.tiers))
    made = [each.result for each in results.tiers if each.result]
    if not made:
        return
    weights = sum(each.weights_per_second for each in made)
    yield f"time             {max(each.seconds for each in made):.1f} s, {weights / 1e6:.1f} M weights/s in all files"
    yield f"peak memory      {gigabytes(max(each.peak_rss_bytes for each in made))}"
    yield f"expert coverage  {coverage(made[0].coverage)}"
    fallbacks = list(dict.fromkeys(sentence for each in made for sentence in each.fallbacks))
    yield f"fallbacks        {len(fallbacks) or 'none'}"
    yield from (f"  {line}" for line in listed(fallbacks, "inspect --provenance shows them"))
    for sentence in dict.fromkeys(sentence for each in made for sentence in each.engine):
        names = ", ".join(
            each.tier for each in results.tiers if each.result and sentence in each.result.engine
        )
        yield paragraph(f"the engine, for {names}: {sentence}")


def _row(each: TierResult) -> tuple[str, str, str, str, str]:
    path = printable(str(each.path))
    if each.result is None:
        return each.tier, path, "", "", each.state
    kept = f", {each.result.resumed_units} of {each.result.units} units of an earlier run"
    made = each.state + (kept if each.result.resumed_units else "")
    return each.tier, path, gigabytes(each.result.total_bytes), each.result.quantization_hash, made
