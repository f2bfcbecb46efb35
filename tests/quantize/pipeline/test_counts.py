"""Small builds ask no more of a device than the committed table says; `make counts` writes it anew."""

from __future__ import annotations

import json
from pathlib import Path

from count_harness import TABLE, counts


def test_builds_ask_of_a_device_what_the_table_says(tmp_path: Path) -> None:
    assert counts(tmp_path) == json.loads(TABLE.read_text(encoding="utf-8"))


def test_what_is_recorded_is_launched_at_once() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert table["calibrated"]["launches"] < table["calibrated"]["kernels"]
