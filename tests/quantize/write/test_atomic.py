"""Files written as a whole: all of the bytes under the name, or none."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import OutputError
from mq_quant.quantize.write.atomic import Written, write_atomic, write_result


def write(path: Path, *pieces: bytes) -> Written:
    return write_atomic(path, map(memoryview, pieces))


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_size_and_hash_are_those_of_the_file(pieces: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        written = write(path, *pieces)
        data = path.read_bytes()
        assert data == b"".join(pieces)
        assert written == Written(len(data), hashlib.sha256(data).hexdigest())
        assert [p.name for p in path.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit")]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    call: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OutputError, match=words):
            write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / ".x.partial").symlink_to(tmp_path / "mine")
    write(tmp_path / "x", b"new")
    assert (tmp_path / "mine").read_bytes() == b"precious" and (tmp_path / "x").read_bytes() == b"new"
    assert not (tmp_path / "x").is_symlink()


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="its folder does not exist any more"):
        write(tmp_path / "gone" / "x", b"new")


def test_a_result_goes_into_a_pipe_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "pipe").read_bytes)
        write_result(tmp_path / "pipe", map(memoryview, (b"ab", b"c")))
        assert read.result() == b"abc"
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_result_into_an_open_stream_follows_what_was_printed(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        out.write(b"before ")
        out.flush()
        for data in (b"first ", b"second"):
            write_result(Path(f"/dev/fd/{out.fileno()}"), [memoryview(data)])
    assert (tmp_path / "out").read_bytes() == b"before first second"
    with pytest.raises(OutputError, match="cannot be written: Bad file descriptor"):
        write_result(Path("/dev/fd/999"), [memoryview(b"x")])


def test_a_full_stream_is_one_error() -> None:
    with pytest.raises(OutputError, match="/dev/full: the disk is full"):
        write_result(Path("/dev/full"), [memoryview(b"x")])


def test_a_result_that_is_no_stream_is_a_file(tmp_path: Path) -> None:
    write_result(tmp_path / "x", [memoryview(b"x")])
    assert (tmp_path / "x").read_bytes() == b"x"
