"""A hint for a path that does not exist names what does."""

from __future__ import annotations

from pathlib import Path

import pytest
from mq_quant.formats.near import near_file


def test_a_name_that_is_nearly_right_is_told(tmp_path: Path) -> None:
    for name in ("tiny.mq2-lloyd", "README.md"):
        (tmp_path / name).touch()
    meant = tmp_path / "tiny.mq2-lloyd"
    assert near_file(tmp_path / "tiny.mq2-loyd") == f"there is {meant}, whose name is nearly the same"
    assert near_file(tmp_path / "unlike") is None


def test_a_file_that_is_there_but_cannot_be_read_needs_no_other_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.mq2").touch()
    (tmp_path / "tiny.mq3").touch()
    assert near_file(tmp_path / "tiny.mq2") is None


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert near_file(tmp_path / "none" / "tiny.mq2") == f"there is no folder {tmp_path / 'none'}"


def test_a_folder_that_cannot_be_looked_into_is_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert near_file(tmp_path / "tiny.mq2") is None
