"""What the environment says about the hub, whatever it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from mq_quant.formats.hub import settings
from mq_quant.formats.hub.client import Hub

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.mark.parametrize("value", ["1", "true", "True", "YES", "on", " on "])
def test_offline(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings.offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert settings.offline()


@pytest.mark.parametrize("value", ["", "0", "false", "no", "off"])
def test_online(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert not settings.offline()


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_address_is_the_public_one(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    monkeypatch.setattr(constants, "ENDPOINT", "")
    assert settings.address() == settings.PUBLIC
    Hub()


@pytest.mark.parametrize("value", ["", "~/.cache/huggingface/hub"])
def test_no_home(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", value)
    assert settings.cache_folder() is None


@pytest.mark.parametrize(("value", "seconds"), [(10, 10.0), (0, 1.0), (-5, 1.0)])
def test_time_limits(value: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", value)
    assert settings.read_seconds() == seconds


def test_a_variable_that_is_no_number() -> None:
    """huggingface_hub reads its variables while it is imported, so another process has to try."""
    code = (
        "from mq_quant.formats.errors import HubError\n"
        "from mq_quant.formats.hub.settings import offline\n"
        "try: offline()\n"
        "except HubError as e: print(e)"
    )
    env = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "soon", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path("/")
    )
    assert "cannot read its environment variables" in done.stdout and "HF_HUB_DOWNLOAD_TIMEOUT" in done.stdout
