"""Text from files of strangers, made safe to be shown: a terminal must never take it for commands."""

from __future__ import annotations

from typing import Any

SHOWN = 80
"""Characters of a foreign value that a message shows."""
NAME = 300
"""Characters of a name that a message shows."""


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with every character that cannot be printed as an escape: `\x1b`, `\u202e`, `\n`.

    That covers control characters, bidirectional overrides, invisible characters and lone surrogates. Characters in
    `keep` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def shown(value: Any, limit: int = SHOWN) -> str:
    """A value from a file for a message: as Python writes it, on one line, printable, at most about `limit` long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        return f"a value of type {type(value).__name__} that is too large to show"
    return shortened(text, limit)


def shortened(text: str, limit: int = NAME) -> str:
    """A name or another text from a file, printable and at most about `limit` long."""
    text = printable(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
