"""Hooks for builds: they count units, and stop a build at one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from mq_quant.quantize.pipeline.work_units import WorkUnit


class StopError(Exception):
    """Raised where a test interrupts a build."""


@dataclass
class Begun:
    """A hook for `on_begin` that keeps the units, and stops the build after `stop` units or at the unit `at`."""

    stop: int | None = None
    at: str | None = None
    units: list[WorkUnit] = field(default_factory=list)

    def __call__(self, unit: WorkUnit) -> None:
        self.units.append(unit)
        if unit.key == self.at or (self.stop is not None and len(self.units) > self.stop):
            raise StopError

    @property
    def keys(self) -> list[str]:
        return [unit.key for unit in self.units]


@contextmanager
def stopped(stop: int | None = None, at: str | None = None) -> Iterator[Begun]:
    """A block that is stopped by the hook that it is given."""
    hook = Begun(stop, at)
    with pytest.raises(StopError):
        yield hook
