"""Progress as a bar on a terminal."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from .progress import State

NAME = 32
"""Characters that are shown of the name of what is worked at."""
BUSY = "{desc} [{elapsed}]"
"""How a phase without a known total is shown: that it goes on, and how long it has."""


class Bar:
    """One bar for each phase; nothing of it stays on the terminal."""

    every = 0.5

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, state: State) -> None:
        """Take the phase; it is drawn when it is told of, so that short work flickers over no terminal."""

    def tell(self, state: State) -> None:
        """Draw the bar."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=state.total or None,
                initial=state.kept,
                desc=f"{state.title}: {state.phase}",
                unit="B" if state.unit == "bytes" else f" {state.unit}",
                unit_scale=state.unit in ("bytes", "weights"),
                smoothing=0,
                bar_format=None if state.total else BUSY,
                file=sys.stderr,
                leave=False,
            )
            self._bar.start_t -= state.seconds
        # tqdm draws nothing on a terminal that says of itself that it has no rows, as containers often do.
        self._bar.ncols, self._bar.nrows = shutil.get_terminal_size()
        self._bar.set_postfix_str(_end(state.doing), refresh=False)
        self._bar.n = state.done
        self._bar.refresh()

    def end(self, state: State) -> None:
        """Wipe the bar out."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _end(name: str) -> str:
    """The end of a long name, which is what tells it from others."""
    return name if len(name) <= NAME else f"…{name[1 - NAME :]}"
