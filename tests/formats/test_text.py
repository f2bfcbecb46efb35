"""Foreign text that is shown: nothing in it may reach a terminal as a command."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import ConfigError, MqError
from mq_quant.formats.text import printable, shown

HOSTILE = [
    "\x1b[2J",
    "\r",
    "\x07",
    "\x00",
    "\x7f",
    "\x9b31m",
    "\u202e",
    "\u2066",
    "\u200b",
    "\u2028",
    "\ud800",
    "\udc80",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_acts_on_becomes_an_escape(text: str) -> None:
    out = printable(f"mq4{text}end")
    assert out.isprintable()
    assert out.startswith("mq4\\")
    assert out.endswith("end")


@given(st.text(st.characters(codec=None)))
def test_any_text_becomes_printable_and_encodable(text: str) -> None:
    out = printable(text)
    assert out.isprintable()
    out.encode("utf-8")
    assert printable(out) == out


def test_plain_text_of_any_script_stays_as_it_is() -> None:
    for text in ("model.layers.0.w1", "Größe Ω 模型 مدل", r"C:\name", ""):
        assert printable(text) == text


def test_kept_characters_stay() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.parametrize("cls", [MqError, ConfigError])
def test_an_error_escapes_its_file_tensor_problem_and_hint(cls: type[MqError]) -> None:
    bad = "\x1b[2J\x9b"
    text = str(cls(f"is {bad}", file=f"a\n{bad}", tensor=f"w\r{bad}", hint=f"rename {bad}"))
    assert text.replace("\n", "").isprintable()
    assert text.splitlines() == [
        "a\\n\\x1b[2J\\x9b: w\\r\\x1b[2J\\x9b: is \\x1b[2J\\x9b",
        "  rename \\x1b[2J\\x9b",
    ]


def test_an_error_keeps_the_lines_of_its_own_text() -> None:
    assert str(MqError("two problems:\n  one\n  two")) == "two problems:\n  one\n  two"


def test_a_value_is_shown_on_one_line_and_not_longer_than_needed() -> None:
    assert shown("mq4") == "'mq4'"
    assert shown({"a": ["\x1b"]}) == "{'a': ['\\x1b']}"
    assert shown("x" * 1000) == f"'{'x' * 79}… (1002 characters)"
    assert shown("x" * 1000, 10) == f"'{'x' * 9}… (1002 characters)"


def test_a_message_is_not_as_long_as_the_name_that_it_tells_of() -> None:
    error = ConfigError("is missing", tensor="x" * 10000)
    assert len(str(error)) < 400
    assert error.tensor == "x" * 10000


def test_values_that_cannot_be_written_out_are_still_told_apart_by_type() -> None:
    deep: list[object] = []
    for _ in range(sys.getrecursionlimit() + 10):
        deep = [deep]
    assert "int" in shown(10**5000)
    assert "list" in shown(deep)
