"""What an encoder asks of its device for every matrix of a shape, recorded once and done from the recording."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ..runtime.host import Backend
from .space import Space


class Recordings:
    """Recordings by a key that names all that they depend on, the places of buffers among it. Those that were made
    before memory of the space was moved are forgotten.
    """

    def __init__(self, backend: Backend, space: Space) -> None:
        self._backend, self._space, self._moves = backend, space, space.moves
        self._known: dict[Hashable, Callable[[], None]] = {}

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do some work, which is recorded when it is asked for first."""
        again = self._known.get(key) if self._moves == self._space.moves else None
        while again is None:
            if self._moves != self._space.moves:
                self._known.clear()
                self._moves = self._space.moves
            made = self._backend.record(work)
            if self._moves == self._space.moves:  # else it names memory that is gone
                again = self._known[key] = made
        again()
