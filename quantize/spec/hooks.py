"""Hooks: functions that long work calls while it goes on, so that others can watch it, count it or stop it."""

from __future__ import annotations


def nothing(*_: object) -> None:
    """The hook of those who watch nothing."""
