"""Long work says how far it is: it is handed a `Watch`, names each phase, and counts what is done.

Who listens is no concern of the work: a progress bar, a line in a log, a program, or nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Literal, Protocol, TypeVar

Unit = Literal["bytes", "weights", "tensors", "layers", "tokens", "files"]
T = TypeVar("T")
S = TypeVar("S", covariant=True)


class Watch(Protocol):
    """Hears of long work. Its methods return at once and may be called on any thread."""

    def begin(self, phase: str, total: int, unit: Unit, done: int = 0) -> None:
        """A phase begins, and the one before it is over; `done` of its `total` units an earlier run has done."""
        ...

    def advance(self, amount: int, doing: str = "") -> None:
        """So many units more are done; `doing` says at which part of the work."""
        ...


class _Unwatched:
    def begin(self, phase: str, total: int, unit: Unit, done: int = 0) -> None:
        pass

    def advance(self, amount: int, doing: str = "") -> None:
        pass


UNWATCHED: Watch = _Unwatched()
"""Nobody listens."""


class _Items(Iterable[S], Sized, Protocol[S]): ...


def watched(
    items: _Items[T], watch: Watch, phase: str, unit: Unit, name: Callable[[T], str] = lambda _: ""
) -> Iterator[T]:
    """The items, one unit each, counted as the work on each of them ends."""
    watch.begin(phase, len(items), unit)
    for item in items:
        yield item
        watch.advance(1, name(item))
