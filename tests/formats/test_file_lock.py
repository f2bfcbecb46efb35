"""The lock: one process at a time, with flock and without, and nobody waits."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats import file_lock
from mq_quant.formats.errors import InUseError, OutputError
from mq_quant.formats.file_lock import OWNER, FileLock


@pytest.fixture(params=["flock", "owner"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file system with locks, and one without."""
    if request.param == "owner":
        refuse_flock(monkeypatch, errno.ENOLCK)
    yield request.param


def refuse_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def owner(path: Path, **changes: Any) -> Path:
    """An owner file of this very process, with changes."""
    file = path.with_name(path.name + OWNER)
    file.write_text(json.dumps(file_lock._identity() | changes))
    return file


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_second_one_is_refused_until_the_first_lets_go(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    first = FileLock(path)
    assert path.with_name(f"x{OWNER}").exists() == (kind == "owner")
    with pytest.raises(InUseError, match="another process uses it"):
        FileLock(path)
    first.close()
    first.close()
    FileLock(path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_holder_may_remove_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    first = FileLock(path)
    path.unlink()
    first.close()
    FileLock(path).close()


@pytest.mark.parametrize(
    "code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get
)
def test_a_file_system_without_locks_has_an_owner_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_flock(monkeypatch, code)
    lock = FileLock(tmp_path / "x")
    said = json.loads((tmp_path / f"x{OWNER}").read_text())
    assert said["process"] == os.getpid() and said["host"]
    lock.close()


def test_other_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_flock(monkeypatch, errno.EIO)
    with pytest.raises(OutputError, match="cannot be locked"):
        FileLock(tmp_path / "x")


@pytest.mark.parametrize("changes", [{}, {"host": "elsewhere"}, {"boot": "another"}, {"space": "another"}])
def test_an_owner_that_may_be_at_work_is_named(changes: dict[str, str], kind: str, tmp_path: Path) -> None:
    """Of another machine, or of processes that cannot be seen from here, nothing is sure."""
    file = owner(tmp_path / "x", **changes)
    with pytest.raises(InUseError) as caught:
        FileLock(tmp_path / "x")
    assert f"process {os.getpid()}" in str(caught.value) and file.name in str(caught.value)
    assert file.exists()


@pytest.mark.parametrize("of", ["a process that has ended", "a later process of the same number"])
def test_an_owner_that_has_ended_is_taken_over(of: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    owner(path, process=ended_process()) if "ended" in of else owner(path, started="1")
    lock = FileLock(path)
    with pytest.raises(InUseError):
        FileLock(path)
    lock.close()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"process": "1"}', b"[" * 4000, b"\xff"])
def test_an_owner_that_cannot_be_understood_is_not_removed(text: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / f"x{OWNER}").write_bytes(text)
    with pytest.raises(InUseError, match=r"remove x\.owner"):
        FileLock(tmp_path / "x")


def test_an_owner_that_took_over_in_between_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """We read a stale owner; before we move it away another process has replaced it with its own."""
    path = tmp_path / "x"
    file = owner(path, process=ended_process())
    refuse_flock(monkeypatch, errno.ENOLCK)
    real: Callable[..., Path] = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == file:
            owner(path)
            monkeypatch.setattr(Path, "rename", real)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InUseError):
        FileLock(path)
    assert json.loads(file.read_text())["process"] == os.getpid()


def test_a_file_that_is_replaced_while_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    real, times = fcntl.flock, 0

    def flock(fd: int, how: int) -> None:
        nonlocal times
        times += 1
        if times == 1:
            path.unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock(path)
    assert times == 2 and os.fstat(lock.fd).st_ino == path.stat().st_ino
    lock.close()
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: path.unlink())
    with pytest.raises(OutputError, match="replaced again and again"):
        FileLock(path)
