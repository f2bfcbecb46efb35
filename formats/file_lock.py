"""An exclusive lock between processes, on file systems with locks and without.

The lock is flock's on a file that stays open. Where the file system has no locks, the holder makes a file NAME.owner
that tells its host and process; one whose process has ended is taken over. Nothing here ever waits.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import InUseError, OutputError
from .own_file import NOT_OFFERED, disk_error, disk_errors, is_at, open_own, write_all

OWNER = ".owner"
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_TRIES = 10
"""A holder may remove the file between our opening and our locking it; then the file is opened again."""
_OWNER_LIMIT = 4096


class FileLock:
    """A plain file of our own, open under `fd` and locked until `close`; made where there is none.

    The file may be removed by the holder while it holds the lock, and by nobody else.
    """

    def __init__(self, path: Path, busy: str = "another process uses it right now") -> None:
        """Take the lock at once.

        Raises InUseError (`busy` is its text) where another process or object holds it, OutputError where the file is
        a link, or belongs to somebody else, or cannot be locked.
        """
        self.path, self._busy = path, busy
        self._owner = path.with_name(path.name + OWNER)
        self._owned = False
        for left in reversed(range(_TRIES)):
            self.fd = open_own(path)
            try:
                self._take()
                # Some network shares give a name and its open file different inode numbers: there the last try counts.
                if is_at(self.fd, path) or (not left and os.fstat(self.fd).st_nlink):
                    return
            except BaseException:
                self.close()
                raise
            self.close()
        raise OutputError("is replaced again and again by another process", file=path)

    def _take(self) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in _HELD:
                raise InUseError(self._busy, file=self.path) from None
            if e.errno not in NOT_OFFERED:
                raise OutputError(f"cannot be locked: {e.strerror}", file=self.path) from None
            self._make_owner()
        else:
            self._remove_stale_owner()

    def _make_owner(self) -> None:
        """Hold the lock by a file that only one process can make."""
        for _ in range(_TRIES):
            self._remove_stale_owner()
            try:
                fd = os.open(self._owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue
            except OSError as e:
                raise disk_error(e, self._owner) from None
            try:
                with disk_errors(self._owner):
                    write_all(fd, memoryview(json.dumps(_identity()).encode()))
            finally:
                os.close(fd)
            self._owned = True
            return
        raise InUseError(self._busy, file=self.path)

    def _remove_stale_owner(self) -> None:
        """Remove an owner file whose process has ended on this machine; InUseError for any other."""
        owner = _read(self._owner)
        if owner is None:
            return
        if not _has_ended(owner):
            where = f"process {owner.get('process')} on host {owner.get('host')}"
            raise InUseError(
                f"{self._busy}: {where}",
                file=self.path,
                hint=f"if that process has ended, remove {self._owner.name} and run the command again",
            )
        # Two processes may find the same stale file: each moves it to a name of its own, and only one move succeeds.
        aside = self._owner.with_name(f"{self._owner.name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            self._owner.rename(aside)
            moved = _read(aside)
            if moved == owner:
                aside.unlink()
            else:  # the file of a process that took over in between
                aside.rename(self._owner)

    def close(self) -> None:
        """Let go of the lock; the file stays."""
        if self._owned:
            self._owned = False
            if _read(self._owner) == _identity():
                with suppress(OSError):
                    self._owner.unlink()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _identity() -> dict[str, Any]:
    """This process: the host, its boot, the space in which process numbers count, the number and the time of start."""
    boot = _text("/proc/sys/kernel/random/boot_id")
    space = None
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return {
        "host": socket.gethostname(),
        "boot": boot,
        "space": space,
        "process": os.getpid(),
        "started": _started(os.getpid()),
    }


def _has_ended(owner: Mapping[str, Any]) -> bool:
    """Whether the process of an owner file has surely ended; of other machines nothing is sure."""
    me = _identity()
    if any(owner.get(key) != me[key] for key in ("host", "boot", "space")):
        return False
    number = owner.get("process")
    if type(number) is not int or number <= 0:
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return bool(owner.get("started") != _started(number))


def _started(process: int) -> str | None:
    """When a process began, in the machine's own ticks: two processes of one number differ in it."""
    text = _text(f"/proc/{process}/stat")
    return text.rpartition(")")[2].split()[19] if text else None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    """What an owner file says: {} where it cannot be understood, None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError:
        return {}
    try:
        said = json.loads(os.read(fd, _OWNER_LIMIT))
    except (OSError, ValueError, RecursionError):
        return {}
    finally:
        os.close(fd)
    return said if isinstance(said, dict) else {}
