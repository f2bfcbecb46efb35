"""Progress on stderr: weights done, weights per second and time left; silent where nobody watches a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from ...formats.text import printable


class Progress:
    """A bar that is drawn once `start` is called; `start` and `advance` are hooks of the work that it watches."""

    def __init__(self, title: str, quiet: bool) -> None:
        self._title, self._quiet = printable(title), quiet
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int, done: int) -> None:
        """Draw the bar over `total` weights, of which `done` are there from an earlier run."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            initial=done,
            desc=self._title,
            unit="w",
            unit_scale=True,
            smoothing=0.05,
            file=sys.stderr,
            disable=True if self._quiet else None,
        )

    def advance(self, weights: int, doing: str) -> None:
        """Move the bar on by so many weights; `doing` is shown beside it."""
        if self._bar is not None:
            self._bar.set_postfix_str(doing, refresh=False)
            self._bar.update(weights)
