"""What commands print, how it is kept safe for terminals and readers of JSON, and how a command ends by Ctrl-C."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from mq_quant.quantize.cli.console import amount, duration, emit, gigabytes, resumable, show, table
from mq_quant.quantize.cli.guard import InterruptError
from mq_quant.quantize.cli.start import INTERRUPTED


def interrupted_lock() -> None:
    """As threading does where Ctrl-C comes while a condition lets go of its lock."""
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("cannot release un-acquired lock")


def test_ctrl_c_ends_with_advice_and_its_code() -> None:
    with pytest.raises(InterruptError) as ended, resumable("go on"):
        raise KeyboardInterrupt
    assert (ended.value.exit_code, ended.value.hint) == (INTERRUPTED, "go on")


def test_so_does_an_error_that_it_leads_to_in_a_lock() -> None:
    with pytest.raises(InterruptError, match="go on"), resumable("go on"):
        interrupted_lock()


@pytest.mark.parametrize("error", [RuntimeError("alone"), ValueError("other")])
def test_other_errors_stay(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as raised, resumable("go on"):
        try:
            raise OSError("before")
        except OSError:
            raise error  # noqa: B904
    assert raised.value is error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "text"), [(86_180_388_864, "86.2 GB"), (2_037_760, "2.0 MB"), (1500, "1.5 kB"), (7, "7 B")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert gigabytes(count) == text


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (228_000_000_000, "weights", "228.0 G weights"),
        (16.2e6, "weights", "16.2 M weights"),
        (12, "layers", "12 layers"),
        (0.5, "layers", "0.5 layers"),
        (2e9, "bytes", "2.0 GB"),
    ],
)
def test_amounts_read_well(count: float, unit: str, text: str) -> None:
    assert amount(count, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (1500, "25 min"), (7200, "2.0 h"), (200_000, "56 h")]
)
def test_times_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tables_align_numbers_to_the_right() -> None:
    assert table(("name", "n"), [("a", 5), ("long", 123)]) == "name    n\na       5\nlong  123"


class Said:
    """A result whose JSON is given."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def as_json(self) -> dict[str, Any]:
        return self.document


@pytest.mark.parametrize(
    "value",
    ["\x1b[2J", "\x9b31m", "\r", "a\nb", "\u202e", "\x7f", "\U000e0001", "\udcff", "größer", 1.5, None],
)
def test_json_is_strict_and_holds_no_control_character(
    value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    emit(Said({"value": value, "x": [value]}), True, str)
    line = capsys.readouterr().out.removesuffix("\n")
    assert line.isprintable()
    assert json.loads(line) == {"value": value, "x": [value]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_null(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    emit(Said({"a": {"b": [value, 1.0]}}), True, str)
    assert json.loads(capsys.readouterr().out) == {"a": {"b": [None, 1.0]}}


def test_text_for_people_holds_no_control_character_but_line_ends(capsys: pytest.CaptureFixture[str]) -> None:
    emit(Said({}), False, lambda _: "one\n\x1b[31mtwo\r")
    assert capsys.readouterr().out == "one\n\\x1b[31mtwo\\r\n"


@pytest.mark.parametrize(
    ("as_json", "quiet", "printed"),
    [(False, False, "text\n"), (False, True, ""), (True, False, '{"a": 1}\n'), (True, True, '{"a": 1}\n')],
)
def test_a_quiet_command_says_nothing_but_json_that_was_asked_for(
    as_json: bool, quiet: bool, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show(Said({"a": 1}), as_json, quiet, lambda _: "text")
    assert capsys.readouterr().out == printed


def test_a_cell_of_a_table_stays_on_its_line() -> None:
    assert table(("a", "b"), [("x\ny", 1)]).splitlines() == ["a     b", "x\\ny  1"]
