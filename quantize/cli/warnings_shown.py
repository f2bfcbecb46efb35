"""Warnings of the rooms below, such as that the hub is waited for, shown as notes while a command runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .console import note

ROOMS = "mq_quant"
"""The logger above those of all modules."""


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def warnings_shown() -> Iterator[None]:
    """While the block lasts, each warning that a module logs is one note."""
    logger, notes = logging.getLogger(ROOMS), _Notes(logging.WARNING)
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)
