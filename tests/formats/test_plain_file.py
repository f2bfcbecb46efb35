"""Files that somebody names are opened only where they are plain files; nothing is waited for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mq_quant.formats.errors import HfqError, InputError, MqError, OutputError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.plain_file import open_plain
from mq_quant.formats.tokenizer import TextTokenizer
from mq_quant.formats.unchanged import UnchangedFile
from mq_quant.quantize.evaluate.result import read_evaluation
from mq_quant.quantize.fit.measurement import read_measurement
from mq_quant.quantize.spec.layer_hashes import read_table
from mq_quant.quantize.spec.places import read_json, read_text
from mq_quant.quantize.spec.recipe import load_recipe
from mq_quant.quantize.write.atomic import write_atomic
from mq_quant.verify.hidden import open_hidden


def test_pipes_devices_and_folders_are_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="is not a plain file"):
            open_plain(path)
    with pytest.raises(IsADirectoryError) as e:
        open_plain(tmp_path)
    assert e.value.errno == errno.EISDIR
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_plain_file_is_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_plain(tmp_path / "link") as f:
        assert f.read() == b"content"


@pytest.mark.parametrize(
    "read",
    [
        load_recipe,
        read_json,
        read_text,
        read_table,
        read_evaluation,
        read_measurement,
        open_hidden,
        TextTokenizer.open,
    ],
)
def test_no_reader_waits_for_a_pipe(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MqError, match=r"pipe: .*is not a plain file") as e:
        read(tmp_path / "pipe")
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EIO, "disk reports a fault"), (errno.ESTALE, "network share has lost")]
)
def test_a_disk_that_fails_is_told_from_a_file_that_is_wrong(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")
    file = UnchangedFile(path, InputError, "is this the folder of a checkpoint?")

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", failing)
    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(InputError, match="cannot be read") as unreadable:
        file.sha256()
    with pytest.raises(HfqError, match="cannot be opened") as unopenable:
        open_hfq(path)
    with pytest.raises(OutputError, match="cannot be written") as unwritable:
        write_atomic(tmp_path / "out", [])
    assert all(said in str(e.value) for e in (unreadable, unopenable, unwritable))
