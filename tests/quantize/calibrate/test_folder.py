"""A calibration folder: locked before it is looked at, and nothing of anybody else's is touched."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.errors import InUseError, OutputError, ResumeError
from mq_quant.formats.statistics.moment_folder import MANIFEST
from mq_quant.quantize.calibrate.folder import (
    JOURNAL,
    CalibrationFolder,
    check_folder,
    discard_folder,
    hidden_file,
)
from mq_quant.quantize.write.journal import read_journal

SIGNATURE = {"tokens.sha256": "a"}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def begun(path: Path) -> Path:
    """An unfinished calibration of one layer."""
    with CalibrationFolder(path, SIGNATURE) as out:
        out.journal.record("layer.0", "0" * 64)
    (path / "layer-00000.safetensors").write_bytes(b"moments")
    return path


def finished(path: Path) -> Path:
    path.mkdir()
    (path / MANIFEST).write_text("{}")
    (path / "layer-00000.safetensors").write_bytes(b"moments")
    return path


@pytest.mark.parametrize("how", [{}, {"restart": True}, {"force": True}])
def test_a_second_process_touches_nothing(how: dict[str, bool], tmp_path: Path) -> None:
    path = begun(tmp_path / "calib")
    with CalibrationFolder(path, SIGNATURE):
        before = contents(path)
        with pytest.raises(InUseError, match="another calibration is writing this folder"):
            CalibrationFolder(path, {"tokens.sha256": "b"}, **how)
        assert contents(path) == before


def test_a_finished_calibration_is_replaced_only_by_force_and_only_once_it_is_locked(tmp_path: Path) -> None:
    path = finished(tmp_path / "calib")
    before = contents(path)
    with pytest.raises(OutputError, match="finished calibration"):
        CalibrationFolder(path, SIGNATURE)
    assert contents(path) == before, "not even a journal is left behind"
    with CalibrationFolder(path, SIGNATURE, force=True):
        assert [p.name for p in path.iterdir()] == [JOURNAL]


def test_what_is_no_calibration_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("photo.jpg", ".git", "journal.txt"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_bytes(b"precious")
        for force in (False, True):
            with pytest.raises(OutputError, match="which is no calibration"):
                CalibrationFolder(folder, SIGNATURE, force, restart=True)
        assert contents(folder) == {name: b"precious"}
    with pytest.raises(OutputError, match="is not a folder"):
        CalibrationFolder(tmp_path / "with photo.jpg" / "photo.jpg", SIGNATURE)
    with pytest.raises(OutputError, match="mkdir -p"):
        CalibrationFolder(tmp_path / "no" / "where", SIGNATURE)


@pytest.mark.parametrize("hard", [False, True])
def test_a_journal_that_is_a_link_is_not_followed(hard: bool, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_bytes(b"precious")
    path = begun(tmp_path / "calib")
    (path / JOURNAL).unlink()
    (path / JOURNAL).hardlink_to(mine) if hard else (path / JOURNAL).symlink_to(mine)
    for restart in (False, True):
        with pytest.raises(OutputError, match="link"):
            CalibrationFolder(path, SIGNATURE, restart=restart)
    assert mine.read_bytes() == b"precious"


def test_other_arguments_are_refused_and_the_folder_stays(tmp_path: Path) -> None:
    path = begun(tmp_path / "calib")
    before = contents(path)
    with pytest.raises(ResumeError, match="the unfinished calibration was begun with other"):
        CalibrationFolder(path, {"tokens.sha256": "b"})
    assert contents(path) == before
    with CalibrationFolder(path, {"tokens.sha256": "b"}, restart=True) as out:
        assert not out.journal.done
    assert read_journal(path / JOURNAL)[0] == [{"job": {"tokens.sha256": "b"}}]


def test_a_folder_made_in_vain_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "ftruncate", failing)
    with pytest.raises(OutputError, match="disk is full"):
        CalibrationFolder(tmp_path / "calib", SIGNATURE)
    assert list(tmp_path.iterdir()) == []


def test_discarding_follows_no_link_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    path = begun(tmp_path / "calib")
    before = contents(path)
    (tmp_path / "link").symlink_to(path)
    discard_folder(tmp_path / "link")
    assert contents(path) == before
    (path / "photo.jpg").write_bytes(b"precious")
    discard_folder(path)
    assert contents(path) == {"photo.jpg": b"precious"}


def test_a_stream_comes_back_as_it_was_saved_or_is_refused(tmp_path: Path) -> None:
    stream = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with CalibrationFolder(tmp_path / "calib", SIGNATURE) as out:
        out.finish_layer(0, [stream.reshape(-1).data.cast("B")], {"sha256": "0" * 64})
        np.testing.assert_array_equal(out.hidden(1, stream.shape), stream)
        file = out.path / hidden_file(1)
        good = file.read_bytes()
        for wrong in (good[:-1], good + b"\0", b"\1" + good[1:], None):
            file.unlink() if wrong is None else file.write_bytes(wrong)
            with pytest.raises(
                ResumeError, match=f"{file.name}: is not as the earlier run left it"
            ) as refused:
                out.hidden(1, stream.shape)
            assert "--restart" in str(refused.value.hint)


def test_what_cannot_be_used_is_told_without_a_touch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / MANIFEST).write_text("{}")
    for name, text in (
        ("file", "is not a folder"),
        ("none/calib", "its folder does not exist"),
        ("finished", "holds a finished calibration"),
    ):
        with pytest.raises(OutputError, match=text):
            check_folder(tmp_path / name, False, False)
    check_folder(tmp_path / "finished", True, False)
    check_folder(tmp_path / "new", False, False)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "finished"}
