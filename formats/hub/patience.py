"""How long a fault of the network is waited for: growing pauses, the server's own wishes, and a bound for both.

Requests fail for reasons that pass (a busy server, a dropped connection) and for reasons that do not. The first kind
is an `AgainError`; `Patience.retried` repeats the attempt and says so. Everything else ends the work at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import HubError
from ..text import printable

T = TypeVar("T")

ATTEMPTS = 7
BUDGET = 90.0
"""Seconds of silence and of pauses, those that the server asked for aside, after which no further attempt is made."""
LONGEST_WISH = 600.0
"""A server that asks for a longer wait than this, in seconds, ends the work: the person decides when to come back."""
PROGRESS = 1 << 20
"""An attempt that brought the file this many bytes further is not counted as a failure."""
SPEAK = 3.0
"""Seconds of waiting from which on a message is worth a line."""
BETWEEN = 10.0
"""Seconds between two messages of one hub, however many threads wait."""
ADVICE = "check the network, the proxy and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache"


class AgainError(Exception):
    """A fault that may pass.

    `wait` are the seconds that the server asked for; `host` is the address that failed, where it is not the hub's;
    `tries` bounds the attempts; `content` says that bytes came and were wrong, which is no silence.
    """

    def __init__(
        self,
        problem: str,
        *,
        wait: float = 0.0,
        host: str | None = None,
        tries: int = ATTEMPTS,
        hint: str = ADVICE,
        content: bool = False,
    ) -> None:
        super().__init__(problem)
        self.problem, self.wait, self.host = problem, wait, host
        self.tries, self.hint, self.content = tries, hint, content


class Patience:
    """Repeats what failed, for any number of threads; `pause` is the first pause in seconds.

    `notify` is handed a line about what is waited for. `stop` ends every wait. What a server asks to wait holds for
    all threads that ask it.
    """

    def __init__(
        self,
        pause: float,
        stop: threading.Event,
        notify: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pause, self._stop, self._notify, self._clock = pause, stop, notify, clock
        self._lock = threading.Lock()
        self._spoke = -BETWEEN
        self._until: dict[str, float] = {}

    def retried(
        self, what: str, host: str, attempt: Callable[[], T], gained: Callable[[], int] = lambda: 0
    ) -> T:
        """The result of `attempt`, repeated while it raises AgainError and patience lasts. Raises HubError.

        `what` is the file or repository that errors name, `host` the address that is asked. `gained` gives the bytes
        of the file that are on the disk.
        """
        failures, pause, silent, best = 0, self._pause, 0.0, gained()
        while True:
            self._wait_for(host, what)
            began = self._clock()
            try:
                return attempt()
            except AgainError as e:
                fault = e
            self.check(what)
            if (now := gained()) - best >= PROGRESS:
                failures, pause, silent, best = 0, self._pause, 0.0, now
                continue
            failures += 1
            silent += 0.0 if fault.content else self._clock() - began
            where = fault.host or host
            if fault.wait > LONGEST_WISH:
                problem = f"{fault.problem} and asks to wait for {fault.wait:.0f} s"
                raise HubError(
                    f"{problem}; the address is {where}", file=what, hint="try again after that time"
                )
            if failures >= fault.tries or silent + pause > BUDGET:
                attempts = "1 attempt" if failures == 1 else f"{failures} attempts"
                problem = f"{fault.problem} ({attempts}); the address is {where}"
                raise HubError(problem, file=what, hint=fault.hint) from None
            silent += pause
            wait, pause = max(pause, fault.wait), pause * 2
            if fault.wait:
                self._hold(host, fault.wait)
            if wait + silent >= SPEAK:
                self.say(f"{what}: {fault.problem} at {where}; next attempt in {wait:.0f} s")
            self._stop.wait(wait)

    def check(self, what: str) -> None:
        """Raise HubError where all transfers are to end."""
        if self._stop.is_set():
            raise HubError("the download was stopped", file=what)

    def _hold(self, host: str, wait: float) -> None:
        with self._lock:
            self._until[host] = max(self._until.get(host, 0.0), self._clock() + wait)

    def _wait_for(self, host: str, what: str) -> None:
        """Wait until `host` may be asked: another thread may have been told to wait."""
        self.check(what)
        with self._lock:
            left = self._until.get(host, 0.0) - self._clock()
        if left > 0:
            if left >= SPEAK:
                self.say(f"{what}: {host} asked for a pause; next attempt in {left:.0f} s")
            self._stop.wait(left)
            self.check(what)

    def say(self, text: str) -> None:
        """Hand a line about waiting to `notify`, unless one was handed over a moment ago."""
        with self._lock:
            now = self._clock()
            if now - self._spoke < BETWEEN:
                return
            self._spoke = now
        self._notify(printable(text))
