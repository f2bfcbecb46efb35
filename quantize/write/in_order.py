"""Work for the disk that goes on behind what computes: some pieces beside each other, ended in the order in which they
were given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

AT_ONCE = 2
"""Pieces that are under way: one waits for the disk while the next one is hashed."""


class InOrder:
    """Threads that do AT_ONCE pieces of work at a time. Whoever gives one more waits until the first of these is done,
    so that what pieces need is held once more than that at most.

    A piece has two parts: the first one runs beside those of other pieces, and the second one once the piece before is
    done. After an error no second part of a later piece is begun.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="disk")
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> InOrder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for all pieces, and raise the first one's error unless another one is on its way already."""
        self._threads.shutdown()
        if error is None:
            self.wait()

    def do(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Begin a piece, once fewer than AT_ONCE are under way: `work`, and `then` with what it gave. Raises the error
        of the piece that this waits for.
        """
        if len(self._under_way) == AT_ONCE:
            self._under_way.popleft().result()
        before = self._under_way[-1] if self._under_way else None
        self._under_way.append(self._threads.submit(_piece, work, then, before))

    def wait(self) -> None:
        """Wait for all pieces; raises the first one's error."""
        while self._under_way:
            self._under_way.popleft().result()


def _piece(work: Callable[[], T], then: Callable[[T], None], before: Future[None] | None) -> None:
    made = work()
    if before is not None:
        before.result()
    then(made)
