"""What an encoder asks of its device for every matrix of a shape, recorded once and done again from the recording."""

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
        self._known: dict[Hashable, Callable[[], None] | None] = {}

    def run(self, key: Hashable, whole: Callable[[], None], part: Callable[[], None] | None = None) -> None:
        """Do the `whole`, which takes memory and loads kernels when it is done first, and is recorded when it is done
        again. Where a `part` of it takes the same memory and loads the same kernels, that is done first, so that the
        whole is recorded at once.
        """
        self._forget_moved()
        if key not in self._known:
            (part or whole)()
            self._forget_moved()
            self._known[key] = None
            if part is None:
                return
        again = self._known[key] or self._backend.record(whole)
        self._known[key] = again
        again()

    def _forget_moved(self) -> None:
        if self._moves != self._space.moves:
            self._known.clear()
            self._moves = self._space.moves
