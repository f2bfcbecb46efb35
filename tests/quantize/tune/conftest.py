"""Tests of tuning take one thread of torch: the work is so small that threads would wait for each other."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """Every test here."""
