"""Files of our own: links are not followed, short writes are continued, and the disk's errors say what to do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import OutputError
from mq_quant.formats.own_file import (
    check_folder_place,
    check_place,
    copy_range,
    disk_errors,
    free_bytes,
    is_at,
    is_stream,
    open_own,
    sync,
    sync_folder,
    write_all,
)


def test_a_plain_file_is_made_and_opened_again(tmp_path: Path) -> None:
    for _ in range(2):
        fd = open_own(tmp_path / "x")
        assert is_at(fd, tmp_path / "x")
        os.close(fd)


def test_links_and_what_is_no_plain_file_are_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    (tmp_path / "symbolic").symlink_to(mine)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "hard").hardlink_to(mine)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, problem in {
        "symbolic": "is a symbolic link",
        "dangling": "is a symbolic link",
        "hard": "a hard link",
        "folder": "cannot be written",
        "pipe": "is no plain file",
    }.items():
        with pytest.raises(OutputError, match=problem):
            open_own(tmp_path / name)
    assert mine.read_bytes() == b"precious" and not (tmp_path / "nowhere").exists()


def test_a_file_of_another_user_is_refused_unless_the_folder_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(open_own(tmp_path / "x"))
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    os.close(open_own(tmp_path / "x"))
    real = Path.stat

    def other_folder(self: Path, **how: bool) -> os.stat_result:
        found = list(real(self, **how))
        found[4] = me + 1
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", other_folder)
    with pytest.raises(OutputError, match="belongs to another user"):
        open_own(tmp_path / "x")


def test_a_name_is_of_the_file_only_while_it_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fd = open_own(path)
    path.rename(tmp_path / "y")
    assert not is_at(fd, path) and is_at(fd, tmp_path / "y")
    path.symlink_to(tmp_path / "y")
    assert not is_at(fd, path)
    os.close(fd)


@given(st.binary(max_size=300), st.integers(1, 50), st.integers(0, 20))
def test_all_bytes_are_written_however_few_a_call_takes(data: bytes, most: int, offset: int) -> None:
    import tempfile

    real = os.pwrite
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, part, at: real(fd, bytes(part)[:most], at))
        write_all(file.fileno(), memoryview(data), offset)
        assert os.pread(file.fileno(), 400, offset) == data


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EIO, "cannot be written"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_the_disks_errors_say_what_to_do(code: int, words: str) -> None:
    with pytest.raises(OutputError, match=f"^x: (?s:.*){words}"), disk_errors(Path("x")):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_syncing_is_a_service_that_may_be_missing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    fd = open_own(tmp_path / "x")
    sync(fd)
    sync_folder(tmp_path)
    os.close(fd)
    sync_folder(tmp_path / "none")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "error")))
    with pytest.raises(OSError, match="error"):
        sync(0)


def test_a_file_system_may_not_tell_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    assert (free_bytes(tmp_path) or 0) > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))
    assert free_bytes(tmp_path) is None

    def refused(_: Path) -> None:
        raise OSError(errno.ENOSYS, "not offered")

    monkeypatch.setattr(shutil, "disk_usage", refused)
    assert free_bytes(tmp_path) is None


@pytest.mark.parametrize("fault", [None, errno.EXDEV, errno.ENOSYS, "missing"])
def test_bytes_are_copied_by_the_system_or_without_it(
    fault: int | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        assert isinstance(fault, int)
        raise OSError(fault, "not here")

    if fault == "missing":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif fault is not None:
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    (tmp_path / "from").write_bytes(b"0123456789")
    source, target = open_own(tmp_path / "from"), open_own(tmp_path / "to")
    try:
        assert copy_range(source, target, 4, 3, 2) == 4
        assert copy_range(source, target, 4, 10, 2) == 0
    finally:
        os.close(source)
        os.close(target)
    assert (tmp_path / "to").read_bytes() == b"\0\x003456"


def test_a_disk_that_is_full_while_the_system_copies_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        copy_range(0, 1, 4, 0, 0)


def test_a_place_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    wrong = {
        "folder": "is a folder",
        "pipe": "is no plain file",
        "none/x": "its folder does not exist",
        "file/x": "its folder does not exist",
        "x" * 300: "its name is too long",
    }
    for name, text in wrong.items():
        with pytest.raises(OutputError, match=text):
            check_place(tmp_path / name)
    for name in ("file", "file/x", "pipe"):
        with pytest.raises(OutputError, match="is not a folder"):
            check_folder_place(tmp_path / name)
    check_place(tmp_path / "file")
    check_place(tmp_path / "new")
    check_folder_place(tmp_path / "some" / "new")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for check in (check_place, check_folder_place):
        with pytest.raises(
            OutputError, match=r"new: cannot be written: Permission denied\n  name another place"
        ):
            check(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file", "pipe"}


@pytest.mark.parametrize(
    "name",
    [
        "/dev/null",
        "/dev/stdout",
        "/dev/stderr",
        "/dev/fd/63",
        "/proc/self/fd/1",
        "/dev/../dev/stdout",
        "PIPE",
    ],
)
def test_streams_take_what_is_written_at_once_and_no_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "PIPE")
    path = tmp_path / name  # which is `name` where that is absolute
    assert is_stream(path)
    check_place(path, stream=True)
    with pytest.raises(OutputError, match="is no plain file") as refused:
        check_place(path)
    assert "--json" in str(refused.value.hint)


@pytest.mark.parametrize("name", ["file", "none", "folder", "/dev/fd/x", "/dev/stdout/x"])
def test_what_is_no_stream(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert not is_stream(tmp_path / name)
