"""A dump beside one of a kit: what the kit's runner says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ....verify.hidden import HiddenComparison
from .check_kit import KitError, judge_hidden, read_manifest
from .make import MANIFEST
from .run import BrokenKitError


def with_kit(compared: HiddenComparison) -> HiddenComparison:
    """The comparison with what a kit says, where one of the two dumps is what a kit's model must give."""
    for expected, dump in ((compared.a, compared.b), (compared.b, compared.a)):
        if (finding := _finding(expected, dump)) is not None:
            return replace(compared, findings=(finding,))
    return compared


def _finding(expected: Path, dump: Path) -> str | None:
    kit = expected.resolve().parent.parent
    if not (kit / MANIFEST).is_file():
        return None
    try:
        for model in read_manifest(kit)["models"]:
            for prompt in model["prompts"]:
                if expected.resolve() == (kit / model["name"] / prompt["expected"]).resolve():
                    found = judge_hidden(kit, model, prompt, dump)
                    return f"{found.where}: {found.problem}" if found else None
    except (KitError, LookupError, TypeError) as e:
        raise BrokenKitError(f"is no whole kit: {e}", file=kit) from None
    return None
