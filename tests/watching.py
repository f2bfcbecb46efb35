"""A watch that keeps what it hears."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from mq_quant.formats.watch import Unit


@dataclass
class Heard:
    """The phases as (name, total, unit, done before), and what was counted in each; `then` may raise."""

    phases: list[tuple[str, int, Unit, int]] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    doing: list[str] = field(default_factory=list)
    then: Callable[[str], None] = lambda _: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, phase: str, total: int, unit: Unit, done: int = 0) -> None:
        self.phases.append((phase, total, unit, done))
        self.counted.append(done)
        self.then(phase)

    def advance(self, amount: int, doing: str = "") -> None:
        with self.lock:
            self.counted[-1] += amount
            self.doing.append(doing)
        self.then(doing)

    def phase(self, name: str) -> tuple[int, int, int]:
        """Total, done before, and all that was counted in the one phase of this name."""
        ((_, total, _, done), counted) = next(
            pair for pair in zip(self.phases, self.counted, strict=True) if pair[0][0] == name
        )
        return total, done, counted
