"""Long work speaks: a bar where somebody watches, a line now and then elsewhere, objects for programs."""

from __future__ import annotations

import io
import json
import sys
import threading

import pytest
from mq_quant.quantize.cli import progress as module
from mq_quant.quantize.cli.console import note
from mq_quant.quantize.cli.events import events_on_stderr
from mq_quant.quantize.cli.progress import Lines, Progress, State, line
from mq_quant.quantize.cli.progress_bar import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees, in seconds, as the only item of a list."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(progress: Progress, clock: list[float]) -> None:
    """Half of ten, three of them by an earlier run, in four seconds."""
    progress.begin("encoding", 10, "weights", 3)
    progress.advance(2, "layer 0")
    clock[0] += 4
    progress.tell()


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with Progress("x", quiet) as progress:
            progress.begin("encoding", 10, "weights")
            progress.advance(5, "unit")
    assert capsys.readouterr() == ("", "")


def test_a_line_says_what_is_done_how_fast_and_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Progress("build x\x1b", False) as progress:
        clock[0] += 7
        progress.tell()
        work(progress, clock)
    assert capsys.readouterr().err.splitlines() == [
        "build x\\x1b: getting ready, 7 s",
        "build x\\x1b: encoding, 50.0% of 10 weights, 0.5 weights/s, 10 s left, layer 0",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Progress("x", True) as progress:
        work(progress, clock)
    assert capsys.readouterr() == ("", "")


def test_how_often_it_speaks() -> None:
    assert Bar.every <= 2 and Lines.every == 30


def test_a_terminal_shows_a_bar_from_the_beginning_and_keeps_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("build x", False) as progress:
        progress.tell()
        assert "build x: getting ready" in terminal.getvalue()
        work(progress, clock)
        assert "build x: encoding:  50%" in terminal.getvalue() and "layer 0" in terminal.getvalue()
    assert terminal.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip() == ""


def test_notes_stand_on_lines_of_their_own_above_the_bar(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """Each part that begins a line anew is either the bar, the bar wiped out, or a note with the end of its line."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("building", False) as progress:
        work(progress, clock)
        threads = [threading.Thread(target=note, args=(f"waiting {i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        progress.advance(5, "unit")
        progress.tell()
        for thread in threads:
            thread.join()
    said = [part for part in terminal.getvalue().split("\r") if "waiting" in part]
    assert sorted(said) == [f"waiting {i}\n" for i in range(4)]


def test_events_are_objects_one_a_line(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with events_on_stderr():
        with Progress("x", True) as progress:
            work(progress, clock)
            note("one\ntwo")
        print("from a library \x1b[31m", file=sys.stderr)
        print("unfinished", end="", file=sys.stderr)
    events = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == [
        "begin", "end", "begin", "progress", "note", "end", "note", "note",
    ]  # fmt: skip
    assert events[3] == {
        "event": "progress", "title": "x", "phase": "encoding", "unit": "weights", "total": 10, "done": 5,
        "doing": "layer 0", "seconds": 4.0, "rate": 0.5, "seconds_left": 10.0,
    }  # fmt: skip
    assert [event["text"] for event in events if event["event"] == "note"] == [
        "one\ntwo", "from a library \x1b[31m", "unfinished",
    ]  # fmt: skip


def test_a_reader_of_events_who_leaves_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    with events_on_stderr(), Progress("x", False) as progress:
        progress.begin("encoding", 1, "weights")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (State("x", "p", "bytes", 10, 0, 0, "", 5.0), "x: p, 0.0% of 10 B"),
        (State("x", "p", "bytes", 10, 5, 5, "", 5.0), "x: p, 50.0% of 10 B"),
        (State("x", "p", "bytes", 10, 0, 12, "", 0.0), "x: p, 120.0% of 10 B"),
        (State("x", "p", "bytes", 10, 0, 12, "", 2.0), "x: p, 120.0% of 10 B, 6 B/s, 0 s left"),
    ],
)
def test_a_line_holds_for_every_state(state: State, said: str) -> None:
    assert line(state) == said
