"""An output never replaces what it is made from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mq_quant.formats.errors import OutputError
from mq_quant.quantize.write.inputs import check_no_input

GOLDEN = Path(__file__).parents[2] / "golden" / "container.hfq"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of inputs, with a shard and a file for the engine in it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "made.mq4").write_bytes(GOLDEN.read_bytes())
    return folder


def test_a_file_in_a_folder_of_inputs_is_kept(folder: Path) -> None:
    shard = folder / "model.safetensors"
    for name in (shard, folder / ".." / "model" / "model.safetensors"):
        with pytest.raises(OutputError, match="input of this command"):
            check_no_input(name, (None, folder))
    assert shard.read_bytes() == b"weights"


def test_an_input_under_another_name_is_kept(folder: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    imatrix.write_bytes(b"GGUF")
    (tmp_path / "link").symlink_to(imatrix)
    os.link(imatrix, tmp_path / "second")
    for name in ("imatrix.gguf", "link", "second"):
        with pytest.raises(OutputError, match="input of this command"):
            check_no_input(tmp_path / name, (imatrix,))


def test_everything_else_may_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    inputs = (None, folder, tmp_path / "none", folder / "model.safetensors")
    for name in (folder / "made.mq4", folder / "new.mq4", tmp_path / "other", tmp_path / "no" / "folder"):
        check_no_input(name, inputs)
