"""Formats that a person does not want, everywhere or in one projection."""

from __future__ import annotations

from collections.abc import Sequence

from ...formats.errors import BudgetError
from .measurement import EXPERT_NAMES, PROJECTIONS, Projection

_BY_SMALL = {name.lower(): name for name in EXPERT_NAMES}


def read_avoided(texts: Sequence[str]) -> frozenset[tuple[Projection, str]]:
    """From MQ4 or down:MQ4 to projections and formats; BudgetError where a text is neither."""
    return frozenset(pair for text in texts for pair in _read(text))


def _read(text: str) -> list[tuple[Projection, str]]:
    where, colon, name = text.rpartition(":")
    projections: list[Projection] = [p for p in PROJECTIONS if not colon or p == where]
    known = _BY_SMALL.get(name.lower())
    if not projections or known is None:
        raise BudgetError(
            f"--avoid {text!r} names no format that experts can have",
            hint=f"give one of {', '.join(EXPERT_NAMES)}, after gate_up: or down: where it is about one of them",
        )
    return [(projection, known) for projection in projections]
