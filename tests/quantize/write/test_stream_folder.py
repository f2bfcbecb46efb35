"""Streams between layers: what was saved comes back or is refused, and nothing of others' is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.errors import OutputError, ResumeError
from mq_quant.quantize.write import stream_folder
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


@pytest.mark.parametrize("block", [1, 7, 32, 1 << 20])
def test_a_file_of_another_size_or_byte_is_refused_however_it_is_read(
    block: int, folder: StreamFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_folder, "_BLOCK", block)
    sha256 = folder.save("own", 0, STREAM)
    np.testing.assert_array_equal(folder.load("own", 0, STREAM.shape, sha256), STREAM)
    (path,) = folder.path.iterdir()
    good = path.read_bytes()
    for wrong in (good[:-1], good + b"\0", b"", b"\1" + good[1:]):
        path.write_bytes(wrong)
        with pytest.raises(ResumeError, match="not as the earlier run left it"):
            folder.load("own", 0, STREAM.shape, sha256)


def test_pieces_need_be_valid_only_one_by_one(folder: StreamFolder) -> None:
    """All of them in the same memory, as they come from a GPU."""
    memory = np.empty(5, "<f4")

    def pieces() -> Iterator[memoryview]:
        for start in range(0, STREAM.size, 5):
            part = STREAM.reshape(-1)[start : start + 5]
            memory[: len(part)] = part
            yield memory[: len(part)].data

    sha256 = folder.save_pieces("own", 1, pieces())
    assert sha256 == folder.save("own", 2, STREAM)
    np.testing.assert_array_equal(folder.load("own", 1, STREAM.shape, sha256), STREAM)


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
