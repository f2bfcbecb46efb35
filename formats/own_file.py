"""Files that a long piece of work keeps for itself: opened without following links, and errors of the disk in words.

A helper file such as NAME.partial lies where others may write, too. Somebody may have put a link there, so that what is
written would land in another file. `open_own` refuses everything that is not a plain file of our own.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_CONTINUES = "then run the same command again: it continues where it stopped"
_WORDS = {
    errno.ENOSPC: ("the disk is full", f"free some space, {_CONTINUES}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space or ask for a larger quota, {_CONTINUES}"),
    errno.EFBIG: (
        "would become larger than a file may be here",
        f"raise the limit (ulimit -f) or use a file system for larger files, {_CONTINUES}",
    ),
    errno.EIO: (
        "cannot be written: the disk reports a fault (Input/output error)",
        f"check the disk and its cable, {_CONTINUES}",
    ),
    errno.ESTALE: (
        "cannot be written: the network share has lost it (Stale file handle)",
        f"see that the share is mounted, {_CONTINUES}",
    ),
    errno.ENAMETOOLONG: ("its name is too long for this file system", "give a shorter name"),
    errno.ENOENT: ("cannot be written: its folder does not exist any more", "make the folder again"),
    errno.ELOOP: ("is a symbolic link, which is not followed here", "remove the link, then run the command again"),
}  # fmt: skip
_REFUSED = {
    errno.EACCES: "name another place, or have the permissions of its folder changed",
    errno.EPERM: "name another place, or have the permissions of its folder changed",
    errno.EROFS: "its disk is mounted to be read only: name another place",
}
NOT_OFFERED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK})
"""What a file system answers that does not offer a service at all."""
_NOT_COPIED = NOT_OFFERED | {errno.EXDEV, errno.EPERM}
"""What systems answer that do not copy from one file to another themselves, or not between these two."""
_PIECE = 8 << 20
_OWN_STREAM = re.compile(r"/(?:dev/fd|proc/self/fd)/(\d{1,6})|/dev/(stdout|stderr)")


def disk_error(error: OSError, path: Path) -> OutputError:
    """What the operating system says about writing `path`, as an error for the user."""
    words = _WORDS.get(error.errno or 0)
    if words is not None:
        return OutputError(words[0], file=path, hint=words[1])
    hint = _REFUSED.get(error.errno or 0)
    return OutputError(f"cannot be written: {error.strerror or error}", file=path, hint=hint)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about writing `path` into an OutputError that says what to do."""
    try:
        yield
    except OSError as e:
        raise disk_error(e, path) from None


def is_stream(path: Path) -> bool:
    """Whether what stands at `path` takes bytes one after another, and is nothing that a file could replace: a pipe, a
    terminal, /dev/null, or a stream of this process, such as /dev/stdout, wherever that leads.
    """
    if _number(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def open_stream(path: Path) -> BinaryIO:
    """Open a stream for writing; a named pipe waits for its reader. What was printed before stands before it."""
    number = _number(path)
    if number is None:
        return path.open("wb")
    sys.stdout.flush()
    return os.fdopen(os.dup(number), "wb")


def _number(path: Path) -> int | None:
    """The number that a path like /dev/stdout or /dev/fd/63 gives to a stream of this process."""
    found = _OWN_STREAM.fullmatch(os.path.normpath(path.absolute()))
    return None if found is None else int(found[1] or {"stdout": 1, "stderr": 2}[found[2]])


def check_place(path: Path, *, stream: bool = False) -> None:
    """Before any work: OutputError where no file can be written at `path`. Touches nothing.

    With `stream` all bytes are written at once in the end, so that a pipe, a terminal and /dev/stdout do as well.
    """
    with disk_errors(path):
        if is_stream(path):
            if stream:
                return
            hint = "give the name of a file, beside which unfinished work can lie; --json prints the result"
            raise OutputError("is no plain file", file=path, hint=hint)
        if not path.parent.is_dir():
            raise OutputError("its folder does not exist", file=path, hint=f"mkdir -p {path.parent}")
        if path.is_dir():
            raise OutputError("is a folder", file=path, hint="give the name of a file")
        if path.exists() and not path.is_file():  # a disk or a socket, which a file would take the place of
            raise OutputError("is no plain file", file=path, hint="give the name of a file")
        _check_folder(path.parent)


def check_folder_place(path: Path) -> None:
    """The same of a folder that is made where there is none, with those above it."""
    with disk_errors(path):
        there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
        if not there.is_dir():
            raise OutputError("is not a folder", file=there, hint="give the name of a folder")
        _check_folder(there)


def _check_folder(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def open_own(path: Path) -> int:
    """Open a plain file of our own for reading and writing, or make it; returns the descriptor.

    Raises OutputError for a symbolic link, a second hard link, anything that is no plain file, and a file of somebody
    else. The owner of the folder counts as ourselves: some network shares give every file one owner.
    """
    with disk_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o644)
        try:
            found = os.fstat(fd)
            owners = {os.geteuid(), path.parent.stat().st_uid}
        except BaseException:
            os.close(fd)
            raise
    problem = None
    if not stat.S_ISREG(found.st_mode):
        problem = "is no plain file"
    elif found.st_nlink > 1:
        problem = "has a second name (a hard link), so writing to it would change another file"
    elif found.st_uid not in owners:
        problem = "belongs to another user"
    if problem is not None:
        os.close(fd)
        raise OutputError(problem, file=path, hint="remove it, then run the command again")
    return fd


def is_at(fd: int, path: Path) -> bool:
    """Whether `path` is a name of the open file itself, not of a link or of a file that took its place."""
    try:
        there = path.lstat()
    except OSError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def write_all(fd: int, data: memoryview, offset: int | None = None) -> None:
    """Write all of `data` at `offset`, or at the end of an appended file; a system call may take fewer bytes."""
    while data:
        n = os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)
        data, offset = data[n:], None if offset is None else offset + n


def copy_range(source: int, target: int, count: int, offset: int, at: int) -> int:
    """Copy up to `count` bytes from `offset` of an open file to `at` of another; how many it were, 0 at the end."""
    by_system: Callable[..., int] | None = getattr(os, "copy_file_range", None)
    if by_system is not None:
        try:
            return by_system(source, target, count, offset, at)
        except OSError as e:
            if e.errno not in _NOT_COPIED:
                raise
    piece = os.pread(source, min(count, _PIECE), offset)
    write_all(target, memoryview(piece), at)
    return len(piece)


def sync(fd: int) -> None:
    """Wait until a file's bytes are on the disk, where the file system offers that."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NOT_OFFERED:
            raise


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free on a folder's disk, None where the file system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as e:
        if e.errno not in NOT_OFFERED:
            raise
        return None
    return usage.free if usage.total else None


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable, where the file system offers that: the files' bytes are safe already."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
