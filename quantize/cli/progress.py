"""How far a command is, told on stderr: a bar on a terminal, elsewhere a line every half minute, or events.

A thread of its own tells it, so that there is a sign of life from the first second, also while libraries are loaded or
one piece of the work takes long. The work only counts.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

from ...formats.text import printable
from ...formats.watch import Unit
from .console import amount, duration, note
from .events import EventStream


@dataclass(frozen=True)
class State:
    """One moment of a phase. `kept` of its `total` units an earlier run has done; a total of 0 is not known."""

    title: str
    phase: str = "getting ready"
    unit: Unit = "bytes"
    total: int = 0
    kept: int = 0
    done: int = 0
    doing: str = ""
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Units a second, on average over the phase."""
        made = self.done - self.kept
        return made / self.seconds if made > 0 and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """What the rest of the phase takes at that rate."""
        return None if self.rate is None else max(0, self.total - self.done) / self.rate

    def as_json(self) -> dict[str, Any]:
        """The fields of an event."""
        rounded = {"rate": self.rate, "seconds_left": self.seconds_left}
        return {
            "title": self.title,
            "phase": self.phase,
            "unit": self.unit,
            "total": self.total,
            "done": self.done,
            "doing": self.doing,
            "seconds": round(self.seconds, 1),
            **{key: None if value is None else round(value, 1) for key, value in rounded.items()},
        }


class Voice(Protocol):
    """One way of telling; `every` is the time between two tellings in seconds."""

    every: float

    def begin(self, state: State) -> None: ...
    def tell(self, state: State) -> None: ...
    def end(self, state: State) -> None: ...


class Lines:
    """A line at most every half minute, for logs."""

    every = 30.0

    def begin(self, state: State) -> None:
        pass

    def tell(self, state: State) -> None:
        """Say what is done, how fast that went, and how long the rest will take."""
        note(line(state))

    def end(self, state: State) -> None:
        pass


def line(state: State) -> str:
    """One state in words."""
    parts = [f"{state.title}: {state.phase}"]
    if state.total:
        share = f"{state.done / state.total:.1%}"
        parts.append(f"{share} of {amount(state.total, state.unit)}")
    else:
        parts.append(duration(state.seconds))
    if state.rate is not None and state.seconds_left is not None:
        parts += [f"{amount(state.rate, state.unit)}/s", f"{duration(state.seconds_left)} left"]
    return ", ".join((*parts, state.doing) if state.doing else parts)


class Events:
    """An event a second, and one at each end of a phase."""

    every = 1.0

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream

    def begin(self, state: State) -> None:
        self._stream.event("begin", **state.as_json())

    def tell(self, state: State) -> None:
        self._stream.event("progress", **state.as_json())

    def end(self, state: State) -> None:
        self._stream.event("end", **state.as_json())


def voice_for(quiet: bool) -> Voice | None:
    """How progress is told on this stderr; None where it is not. Events are sent to whoever asked for them."""
    if isinstance(sys.stderr, EventStream):
        return Events(sys.stderr)
    if quiet:
        return None
    if sys.stderr.isatty():
        from .progress_bar import Bar

        return Bar()
    return Lines()


class Progress:
    """A `Watch` that tells what it hears for as long as its block lasts."""

    def __init__(self, title: str, quiet: bool = False) -> None:
        self._voice = voice_for(quiet)
        self._state, self._began = State(printable(title)), time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._voice is not None:
            self._voice.begin(self._state)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._voice is not None:
            self._over.set()
            self._thread.join()
            self._voice.end(self._now())

    def begin(self, phase: str, total: int, unit: Unit, done: int = 0) -> None:
        """As `Watch.begin`."""
        with self._lock:
            before = self._now()
            self._state = State(self._state.title, phase, unit, total, done, done)
            self._began = time.monotonic()
            if self._voice is not None:
                self._voice.end(before)
                self._voice.begin(self._state)

    def advance(self, amount: int, doing: str = "") -> None:
        """As `Watch.advance`."""
        with self._lock:
            self._state = replace(self._state, done=self._state.done + amount, doing=printable(doing))

    def tell(self) -> None:
        """Tell now how far the work is."""
        with self._lock:
            if self._voice is not None:
                self._voice.tell(self._now())

    def _now(self) -> State:
        return replace(self._state, seconds=time.monotonic() - self._began)

    def _run(self) -> None:
        assert self._voice is not None
        while not self._over.wait(self._voice.every):
            self.tell()
