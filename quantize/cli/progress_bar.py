"""Progress on stderr: weights done, weights per second and time left; silent where nobody watches a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A bar over `total` weights, of which `done` are there from an earlier run."""

    def __init__(self, title: str, total: int, done: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit="w",
            unit_scale=True,
            smoothing=0.05,
            file=sys.stderr,
            disable=True if quiet else None,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, weights: int, doing: str) -> None:
        self._bar.set_postfix_str(doing, refresh=False)
        self._bar.update(weights)
