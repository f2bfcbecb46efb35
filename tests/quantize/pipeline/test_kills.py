"""The kill harness, for a few kills: SIGKILL at random moments and SIGINT end in the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kill_harness.py")


@pytest.mark.parametrize("seed", [1])
def test_killed_builds_end_in_identical_bytes(seed: int) -> None:
    command = [sys.executable, str(HARNESS), "--kills", "10", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 10
    assert result["identical"] == result["files"] > 0
    assert 0 <= result["units_lost_most"] <= result["units_in_flight"]
    assert result["interrupt_clean"]
