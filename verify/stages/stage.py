"""What a stage of verification says: what it saw, what is wrong, and its figures. Depends on nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LISTED = 20
"""Problems listed in full; the rest are counted."""


@dataclass(frozen=True)
class Stage:
    """One stage's result; it holds only if it saw something and found no problem."""

    name: str
    seen: int
    unit: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

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
            **self.values,
        }
