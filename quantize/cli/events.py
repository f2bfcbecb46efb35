"""`--json-events`: stderr on which each line is one JSON object with the key `event`.

The kinds are begin, progress and end of a phase of work, note, and error. What libraries write to stderr as text
becomes notes, so that a program that reads the stream never meets a line of another form.
"""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_LINE_ENDS = re.compile(r"[\r\n]+")


def event_line(kind: str, fields: dict[str, Any]) -> str:
    """One event as a line of ASCII without its end."""
    return json.dumps({"event": kind, **fields}, allow_nan=False)


class EventStream(io.TextIOBase):
    """A stream over another one: text that is written becomes notes, `event` writes anything else. For any thread."""

    def __init__(self, under: TextIO) -> None:
        self._under, self._text = under, ""
        self._lock = threading.RLock()

    def event(self, kind: str, **fields: Any) -> None:
        """Write one event; a stream that nobody reads ends nothing."""
        with self._lock, suppress(OSError):
            self._under.write(event_line(kind, fields) + "\n")
            self._under.flush()

    def write(self, text: str) -> int:
        """Take text, and make a note of each line that is complete."""
        with self._lock:
            *lines, self._text = _LINE_ENDS.split(self._text + text)
            for line in filter(str.strip, lines):
                self.event("note", text=line)
        return len(text)

    def flush(self) -> None:
        """Events are written at once, and an incomplete line waits for its end."""

    def finish(self) -> None:
        """Make a note of a last line without an end."""
        self.write("\n")

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._under.fileno()


@contextmanager
def events_on_stderr() -> Iterator[None]:
    """While the block lasts, stderr is an EventStream."""
    before = sys.stderr
    stream = EventStream(before)
    sys.stderr = stream
    try:
        yield
    finally:
        stream.finish()
        sys.stderr = before
