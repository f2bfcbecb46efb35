"""Files written as a whole: all of the bytes under the name, or none."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import OutputError
from mq_quant.quantize.write.atomic import Written, write_atomic


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
