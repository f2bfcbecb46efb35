"""The progress bar: drawn where somebody watches, silent elsewhere."""

from __future__ import annotations

import pytest
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
