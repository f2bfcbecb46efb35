"""Work for the disk that goes on behind what computes, in the order in which it was given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class InOrder:
    """A thread that does one piece of work at a time. Whoever gives the next one waits until the last one is done, so
    that what a piece needs is held twice at most, and an error is raised before anything comes after it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._last: Future[None] | None = None

    def __enter__(self) -> InOrder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last piece, and raise its error unless another one is on its way already."""
        self._thread.shutdown()
        if error is None:
            self.wait()

    def do(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, once the last one is done; raises the error of that."""
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Wait for the last piece; raises its error."""
        if self._last is not None:
            self._last.result()
