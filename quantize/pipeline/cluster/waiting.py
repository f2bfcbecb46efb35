"""What a driver says while the cluster does nothing for it, and when it gives up.

A cluster that grows by itself, or that others use too, may be late; one that has lost its nodes never comes back. Both
look alike to Ray, which keeps tasks until a node can take them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ....formats.errors import ClusterError
from .ray_session import Needs, in_words

QUIET = 300.0
"""Seconds without the end of a task after which the driver says what it waits for; then twice as long, and so on."""
LOST = 600.0
"""Seconds without a node for any task after which the build ends: clusters that start nodes by themselves need some."""


@dataclass
class Waiting:
    """The clock of a driver whose tasks have these needs; every time is in seconds of one clock that only grows."""

    needs: Needs
    heard_at: float
    on_note: Callable[[str], None]
    _patience: float = QUIET
    _lost_at: float | None = None

    def heard(self, now: float) -> None:
        """A task has ended. Where tasks are long, silence that is twice as long as this one tells nothing either."""
        self.heard_at, self._patience = now, max(QUIET, 2 * (now - self.heard_at))

    def look(self, nodes: Sequence[Mapping[str, float]], now: float) -> None:
        """Say what is waited for, if it is time, given what each living node has.

        Raises ClusterError where no node has been able to take a task for so long that none will come.
        """
        if any(map(self.needs.slots, nodes)):
            if self._lost_at is not None:
                self._lost_at, self.heard_at = None, now
            if now - self.heard_at >= self._patience:
                self.on_note(
                    f"no task has ended for {_minutes(now - self.heard_at)}; each asks for {self.needs}, and there "
                    f"{_are(nodes)}. `ray status` tells whether others use them"
                )
                self._patience *= 2
        elif self._lost_at is None:
            self._lost_at = now
            self.on_note(f"{self._nobody(nodes)}. The build waits {_minutes(LOST)} for one that can")
        elif now - self._lost_at >= LOST:
            raise ClusterError(
                f"{self._nobody(nodes)}, for {_minutes(now - self._lost_at)} by now",
                hint="start a node (`ray start --address …`), or see `ray status`; the same command continues",
            )

    def _nobody(self, nodes: Sequence[Mapping[str, float]]) -> str:
        return f"no node of the cluster can take a task: each asks for {self.needs}, and there {_are(nodes)}"


def _are(nodes: Sequence[Mapping[str, float]]) -> str:
    """What there is, nodes with the same resources together."""
    alike = Counter(in_words(node.get("CPU", 0), node.get("GPU", 0), node.get("memory", 0)) for node in nodes)
    said = [f"{n} node{'s' * (n > 1)} with {has}" for has, n in alike.items()]
    return f"{'are' if len(nodes) != 1 else 'is'} {'; '.join(said) or 'no nodes'}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes"
