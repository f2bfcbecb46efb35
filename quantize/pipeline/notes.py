"""What rounding had to fall back on, from single experts' notes to sentences in a layer's report.

Sentences name experts in ascending order, so they depend on the spec alone: not on threads, nor on the units that an
earlier run encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...formats.minimax import PROJECTIONS

Notes = Mapping[str, Sequence[str]]
"""Per projection, what one expert's rounding fell back on."""

SHOWN_EXPERTS = 8
SHOWN = 8
"""Sentences of one layer: a file's metadata has room for as many, whatever goes wrong."""


def with_notes(report: Mapping[str, Any], notes: Mapping[int, Notes], experts: int) -> dict[str, Any]:
    """A layer's report, its fallbacks extended by the notes of its experts."""
    return {**report, "fallbacks": [*report["fallbacks"], *sentences(report["layer"], notes, experts)]}


def sentences(layer: int, notes: Mapping[int, Notes], experts: int) -> list[str]:
    """One sentence per projection and note, naming the experts; `experts` is how many the layer has."""
    found: dict[tuple[str, str], list[int]] = {}
    for projection in PROJECTIONS:
        for expert in sorted(notes):
            for note in notes[expert].get(projection, ()):
                found.setdefault((projection, note), []).append(expert)
    out = [f"layer {layer} {p}: {named(of, experts)}: {note}" for (p, note), of in found.items()]
    if len(out) > SHOWN:
        out[SHOWN - 1 :] = [f"layer {layer}: {len(out) - SHOWN + 1} more kinds of fallback"]
    return out


def named(of: Sequence[int], experts: int) -> str:
    """Experts in words: all of them, or their numbers."""
    if len(of) == experts:
        return "all experts"
    more = f", … ({len(of)})" if len(of) > SHOWN_EXPERTS else ""
    return f"experts {', '.join(map(str, of[:SHOWN_EXPERTS]))}{more}"
