"""The scratch folder is ours alone: no link is followed, no folder shared, and nothing loops without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
from mq_quant.formats.checkpoint import scratch
from mq_quant.formats.checkpoint.scratch import LOCK, Scratch
from mq_quant.formats.errors import HubError

COMMIT = "1" * 40
FIRST = f".mq-quant-{COMMIT[:12]}-0"


def test_a_folder_of_our_own_that_goes_with_its_use(tmp_path: Path) -> None:
    mine = Scratch(tmp_path / "new", COMMIT)
    assert mine.path == tmp_path / "new" / FIRST
    assert stat.S_IMODE(mine.path.stat().st_mode) == 0o700
    (mine.path / "shard").write_text("bytes")
    mine.close()
    assert not list((tmp_path / "new").iterdir())


def test_two_runs_have_two_folders(tmp_path: Path) -> None:
    first, second = Scratch(tmp_path, COMMIT), Scratch(tmp_path, COMMIT)
    assert first.path != second.path
    first.close()
    third = Scratch(tmp_path, COMMIT)
    assert third.path == first.path
    for used in (second, third):
        used.close()


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / FIRST).mkdir()
    (tmp_path / FIRST / LOCK).write_bytes(b"")
    (tmp_path / FIRST / "shard").write_text("bytes")
    mine = Scratch(tmp_path, COMMIT)
    assert mine.path == tmp_path / FIRST
    assert (mine.path / "shard").read_text() == "bytes"
    mine.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    first, second = Scratch(tmp_path, COMMIT), Scratch(tmp_path, COMMIT)
    assert first.path != second.path
    first.close()
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_fails_for_good_ends_with_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(HubError, match="cannot be locked"):
        Scratch(tmp_path, COMMIT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["folder", "file", "nothing"])
def test_a_link_in_the_folders_place_is_not_followed(to: str, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    if to == "folder":
        target.mkdir()
        (target / LOCK).write_text("my lock")
        (target / "weights.safetensors").write_text("my weights")
    elif to == "file":
        target.write_text("my text")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / FIRST).symlink_to(target)
    used = Scratch(tmp_path / "work", COMMIT)
    assert used.path.name != FIRST
    used.close()
    assert (tmp_path / "work" / FIRST).is_symlink()
    if to == "folder":
        assert {p.name: p.read_text() for p in target.iterdir()} == {
            LOCK: "my lock",
            "weights.safetensors": "my weights",
        }
    assert to != "nothing" or not target.exists()


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_that_is_no_file_of_ours(kind: str, tmp_path: Path) -> None:
    (tmp_path / FIRST).mkdir()
    (tmp_path / "mine").write_text("my text")
    lock = tmp_path / FIRST / LOCK
    {
        "link": lambda: lock.symlink_to(tmp_path / "mine"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    used = Scratch(tmp_path, COMMIT)
    assert used.path.name != FIRST
    used.close()
    assert (tmp_path / "mine").read_text() == "my text"


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / FIRST).write_text("mine")
    used = Scratch(tmp_path, COMMIT)
    assert used.path.name != FIRST
    used.close()
    assert (tmp_path / FIRST).read_text() == "mine"


def test_no_folder_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "MOST", 3)
    used = [Scratch(tmp_path, COMMIT) for _ in range(3)]
    with pytest.raises(HubError, match="none of 3 scratch folders"):
        Scratch(tmp_path, COMMIT)
    for each in used:
        each.close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot be made"):
        Scratch(tmp_path / "file", COMMIT)
