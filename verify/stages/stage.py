"""What a stage of verification says: how much it saw, what is wrong, and its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

LISTED = 20
"""Problems that are written out; the rest are counted."""


class Figures(Protocol):
    """What a stage measured, besides whether it holds."""

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class StageResult:
    """One stage's result. It holds only if it saw something and found no problem.

    `seen` counts what the stage looked at, in `unit`s; `figures` is None where it broke off.
    """

    name: str
    seen: int
    unit: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Figures | None = None

    @property
    def complaints(self) -> tuple[str, ...]:
        """The problems, among them that nothing was seen."""
        return self.problems if self.seen else (*self.problems, f"the stage saw no {self.unit}")

    @property
    def ok(self) -> bool:
        return not self.complaints

    def as_json(self) -> dict[str, Any]:
        complaints = self.complaints
        return {
            "stage": self.name,
            "ok": self.ok,
            "seen": self.seen,
            "unit": self.unit,
            "problems": list(complaints[:LISTED]),
            "problem_count": len(complaints),
            "notes": list(self.notes),
            **(self.figures.as_json() if self.figures else {}),
        }
