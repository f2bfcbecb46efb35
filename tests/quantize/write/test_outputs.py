"""Results are not written over what is there, nor begun where there is no room for the work."""

from __future__ import annotations

from pathlib import Path

import pytest
from mq_quant.formats.errors import OutputError
from mq_quant.quantize.write import outputs
from mq_quant.quantize.write.outputs import check_output, check_work_fits


def test_what_is_there_is_kept_unless_a_file_may_be_replaced(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    with pytest.raises(OutputError, match="exists already") as refused:
        check_output(file, force=False)
    assert refused.value.hint == "give --force to replace it, or another name"
    for force in (False, True):
        with pytest.raises(OutputError, match="is a folder"):
            check_output(folder, force)
    check_output(file, force=True)
    check_output(tmp_path / "new", force=False)
    assert file.read_text() == "mine" and not (tmp_path / "new").exists()


def test_a_folder_that_is_missing_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="its folder does not exist") as refused:
        check_output(tmp_path / "no" / "file", force=True)
    assert refused.value.hint == f"mkdir -p {tmp_path / 'no'}"
    assert not (tmp_path / "no").exists()


def test_work_is_refused_that_the_disk_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 10**9 if folder == tmp_path else None)
    check_work_fits(tmp_path / "file", 10**9, "--less")
    with pytest.raises(OutputError, match=r"needs 1\.5 GB and its disk has 1\.0 GB free") as refused:
        check_work_fits(tmp_path / "file", 15 * 10**8, "--less")
    assert "ask for less with --less" in str(refused.value.hint)
    check_work_fits(tmp_path / "elsewhere" / "file", 10**18, "--less")
