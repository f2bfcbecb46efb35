"""What several files of one source have in common is made once, while a unit of theirs is encoded.

A result is kept under a key that names everything that decides it besides what all files share: the weights, and what
is known of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from typing import Any, Protocol, TypeVar

from ...formats.errors import MqError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Once(Protocol):
    """Makes results, or hands out those that were made under the same key. For one thread."""

    @property
    def keeps(self) -> bool:
        """Whether results are handed out again, so that nobody may write over them."""
        ...

    def one(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of this key."""
        ...

    def each(self, keys: Mapping[K, Hashable], make: Callable[[Sequence[K]], Sequence[T]]) -> dict[K, T]:
        """The results of several keys by their names; `make` makes those that are missing, all in one call."""
        ...


class Alone:
    """For a single file, of which no result is asked for twice: nothing is kept."""

    keeps = False

    def one(self, key: Hashable, make: Callable[[], T]) -> T:
        """As `Once.one`."""
        return make()

    def each(self, keys: Mapping[K, Hashable], make: Callable[[Sequence[K]], Sequence[T]]) -> dict[K, T]:
        """As `Once.each`."""
        return dict(zip(keys, make(list(keys)), strict=True))


ALONE = Alone()


class Together:
    """For several files: results are kept as long as it lives."""

    keeps = True

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def one(self, key: Hashable, make: Callable[[], T]) -> T:
        """As `Once.one`."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def each(self, keys: Mapping[K, Hashable], make: Callable[[Sequence[K]], Sequence[T]]) -> dict[K, T]:
        """As `Once.each`."""
        missing = [name for name, key in keys.items() if key not in self._kept]
        if missing:
            self._kept |= zip((keys[name] for name in missing), make(missing), strict=True)
        return {name: self._kept[key] for name, key in keys.items()}


def once_for(files: Sized) -> Once:
    """What keeps results for these files."""
    return Together() if len(files) > 1 else ALONE


def attempt(work: Callable[[], T]) -> T | MqError:
    """What some work returns, or the error in which it ends: that of one file stops no other."""
    try:
        return work()
    except MqError as e:
        return e
