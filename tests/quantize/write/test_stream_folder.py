"""Streams between layers: what was saved comes back or is refused, and nothing of others' is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.errors import OutputError, ResumeError
from mq_quant.quantize.write.stream_folder import StreamFolder

STREAM = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> StreamFolder:
    return StreamFolder(tmp_path / "streams", True, "begin anew")


def test_a_stream_comes_back_as_it_was(folder: StreamFolder) -> None:
    sha256 = folder.save("file12", 3, STREAM)
    for read in (folder.load, folder.mapped):
        np.testing.assert_array_equal(read("file12", 3, STREAM.shape, sha256), STREAM)
    again = StreamFolder(folder.path, False, "begin anew")
    np.testing.assert_array_equal(again.load("file12", 3, STREAM.shape, sha256), STREAM)


@pytest.mark.parametrize("sha256", ["0" * 64, None, 7])
def test_other_bytes_are_refused_with_the_hint(folder: StreamFolder, sha256: object) -> None:
    folder.save("own", 0, STREAM)
    with pytest.raises(ResumeError, match="not as the earlier run left it") as e:
        folder.load("own", 0, STREAM.shape, sha256)
    assert e.value.hint == "begin anew"
    folder.drop("own", 0)
    with pytest.raises(ResumeError):
        folder.mapped("own", 0, STREAM.shape, sha256)


def test_only_streams_are_removed(folder: StreamFolder) -> None:
    folder.save("source", 0, STREAM)
    (folder.path / ".own-00001.f32.partial").write_bytes(b"x")
    (folder.path / "mine.f32").write_bytes(b"x")
    folder.discard()
    assert [p.name for p in folder.path.iterdir()] == ["mine.f32"]
    StreamFolder(folder.path, True, "")
    assert (folder.path / "mine.f32").exists()
    (folder.path / "mine.f32").unlink()
    folder.discard()
    assert not folder.path.exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_way_is_kept(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "streams"
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path)
    with pytest.raises(OutputError, match="in the way"):
        StreamFolder(target, True, "")
    assert target.is_symlink() or target.read_text() == "mine"
