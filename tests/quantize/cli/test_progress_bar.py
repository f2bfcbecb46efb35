"""The progress bar: drawn where somebody watches, silent elsewhere."""

from __future__ import annotations

import io
import sys
import threading

import pytest
from mq_quant.quantize.cli.console import note
from mq_quant.quantize.cli.progress_bar import Progress


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with Progress("x", quiet) as bar:
            bar.start(10, 0)
            bar.advance(5, "unit")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_bar_that_never_started_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", False) as bar:
        bar.advance(5, "unit")
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_notes_stand_on_lines_of_their_own_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part that begins a line anew is either the bar, the bar wiped out, or a note with the end of its line."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("building", False) as bar:
        bar.start(10, 0)
        threads = [threading.Thread(target=note, args=(f"waiting {i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        bar.advance(5, "unit")
        for thread in threads:
            thread.join()
    said = [part for part in terminal.getvalue().split("\r") if "waiting" in part]
    assert sorted(said) == [f"waiting {i}\n" for i in range(4)]
