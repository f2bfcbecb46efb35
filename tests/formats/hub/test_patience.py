"""How long faults are waited for, on a clock that the test turns: growing pauses, wishes, bounds, and words."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from mq_quant.formats.errors import HubError
from mq_quant.formats.hub.patience import (
    ATTEMPTS,
    BETWEEN,
    BUDGET,
    LONGEST_WISH,
    PROGRESS,
    AgainError,
    Patience,
)

HOST = "https://hub.example"


class Clock(threading.Event):
    """A stop event whose waits turn the clock instead of taking time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        self.waits.append(timeout)
        return self.is_set()

    def __call__(self) -> float:
        return self.now


class Case:
    def __init__(self, pause: float = 1.0) -> None:
        self.clock, self.said = Clock(), list[str]()
        self.patience = Patience(pause, self.clock, self.said.append, self.clock)

    def fails(self, *faults: AgainError, takes: float = 0.0, gains: int = 0) -> int:
        """How many attempts were made; each fault ends one attempt, the last for ever."""
        made, size = 0, 0

        def attempt() -> int:
            nonlocal made, size
            made += 1
            self.clock.now += takes
            size += gains
            raise faults[min(made, len(faults)) - 1]

        with pytest.raises(HubError) as e:
            self.patience.retried("a/b", HOST, attempt, lambda: size)
        self.error = str(e.value)
        return made


def succeeds_after(times: int, fault: Callable[[], AgainError]) -> Callable[[], str]:
    left = [times]

    def attempt() -> str:
        if left[0]:
            left[0] -= 1
            raise fault()
        return "done"

    return attempt


def test_pauses_grow_and_the_last_failure_is_not_waited_for() -> None:
    case = Case()
    assert case.fails(AgainError("no answer")) == ATTEMPTS
    assert case.clock.waits == [1, 2, 4, 8, 16, 32]
    assert "a/b: no answer (7 attempts); the address is https://hub.example" in case.error
    assert "HF_ENDPOINT" in case.error and "HF_HUB_OFFLINE" in case.error


def test_the_host_that_failed_is_named() -> None:
    case = Case()
    case.fails(AgainError("no answer", host="http://storage.example:81", hint="wait"))
    assert "the address is http://storage.example:81\n  wait" in case.error


def test_silence_is_bounded_by_the_clock() -> None:
    """A server that accepts and never answers costs a time-out for each attempt."""
    case = Case()
    assert case.fails(AgainError("timed out"), takes=20) < ATTEMPTS
    assert case.clock.now - 1000 <= BUDGET + 20


def test_bytes_that_came_and_were_wrong_are_no_silence() -> None:
    """Fetching a large file takes long, also where its hash turns out to be wrong."""
    case = Case()
    assert case.fails(AgainError("wrong hash", content=True), takes=1000) == ATTEMPTS


def test_what_the_server_asks_for_is_waited() -> None:
    case = Case()
    attempt = succeeds_after(2, lambda: AgainError("busy", wait=50.0))
    assert case.patience.retried("a/b", HOST, attempt) == "done"
    assert case.clock.waits == [50, 50]
    assert case.said == [f"a/b: busy at {HOST}; next attempt in 50 s"] * 2


def test_a_wish_shorter_than_the_pause_does_not_make_a_flood() -> None:
    case = Case()
    assert case.fails(AgainError("busy", wait=1.0)) == ATTEMPTS
    assert case.clock.waits == [1, 2, 4, 8, 16, 32]


def test_a_wish_beyond_reason_ends_the_work() -> None:
    case = Case()
    assert case.fails(AgainError("busy", wait=LONGEST_WISH + 1)) == 1
    assert not case.clock.waits
    assert "asks to wait for 601 s" in case.error and "try again after that time" in case.error


def test_a_wish_holds_for_every_thread_that_asks_that_host() -> None:
    case = Case()
    case.patience._hold(HOST, 30)
    assert case.patience.retried("a/b", "https://other.example", lambda: 1) == 1
    assert not case.clock.waits
    assert case.patience.retried("a/b", HOST, lambda: 1) == 1
    assert case.clock.waits == [30]
    assert "asked for a pause" in case.said[0]


def test_attempts_that_bring_the_file_further_are_not_counted() -> None:
    case = Case()
    size, made = 0, 0

    def attempt() -> int:
        nonlocal size, made
        made += 1
        if size < 20 * PROGRESS:
            size += PROGRESS
            raise AgainError("dropped")
        return size

    assert case.patience.retried("a/b", HOST, attempt, lambda: size) == 20 * PROGRESS
    assert made == 21 and not case.clock.waits


def test_a_file_that_is_fetched_anew_again_and_again_is_given_up() -> None:
    """Only what is beyond the best so far counts as progress."""
    case = Case()
    size, made = 0, 0

    def attempt() -> None:
        nonlocal size, made
        made += 1
        size = 0 if made % 2 == 0 else 5 * PROGRESS
        raise AgainError("wrong", content=True)

    with pytest.raises(HubError, match="7 attempts"):
        case.patience.retried("a/b", HOST, attempt, lambda: size)
    assert made == ATTEMPTS + 1


def test_words_come_once_for_all_threads() -> None:
    case = Case()
    case.fails(AgainError("no answer"))
    assert case.said[0].startswith("a/b: no answer at https://hub.example; next attempt in 2 s")
    assert len(case.said) <= 1 + (1 + 2 + 4 + 8 + 16 + 32) / BETWEEN


def test_short_waits_are_not_worth_a_word() -> None:
    case = Case(pause=0.001)
    case.fails(AgainError("no answer"))
    assert not case.said


def test_names_from_the_hub_cannot_command_the_terminal() -> None:
    case = Case()
    attempt = succeeds_after(1, lambda: AgainError("busy", wait=9.0))
    case.patience.retried("a/\x1b[2Jb", HOST, attempt)
    assert "\x1b" not in case.said[0]


def test_a_stop_ends_every_wait() -> None:
    case = Case()
    case.clock.set()
    with pytest.raises(HubError, match="stopped"):
        case.patience.retried("a/b", HOST, lambda: 1)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError):
        Case().patience.retried("a/b", HOST, lambda: 1 // 0)
