"""What a module warns of is shown as a note while a command runs, and by Python's own means otherwise."""

from __future__ import annotations

import logging

import pytest
from mq_quant.formats.hub.client import Hub
from mq_quant.quantize.cli.warnings_shown import ROOMS, warnings_shown


def test_what_the_hub_waits_for_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_shown():
        Hub("https://hub.example").notify("no answer for 100 %\x1b; waiting")
    assert capsys.readouterr().err == "no answer for 100 %\\x1b; waiting\n"


def test_nothing_stays_behind(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger(ROOMS).handlers[:]
    with pytest.raises(ValueError), warnings_shown():
        raise ValueError
    assert logging.getLogger(ROOMS).handlers == before
