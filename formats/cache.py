"""Caches on disk that hold code: folders that only this user may enter, files that are checked before they are used.

Whoever can write to such a file can run code as this user, and a file that a power cut has shortened would crash the
next run. So a folder is taken only if it belongs to this user, and is closed to others. A file ends with the SHA-256 of
its content, and counts as missing where that does not match or where others may write to it. Nobody needs a cache:
where no folder can be written, the work is done again.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from .machine import home, variable

NAME = "mq-quant"
_DIGEST = hashlib.sha256().digest_size


def places() -> Iterator[Path]:
    """Where caches of this user may lie, best first, whether or not they can be written.

    $XDG_CACHE_HOME, ~/.cache, then a folder of this user's own among temporary files.
    """
    given = variable("XDG_CACHE_HOME")
    if given and Path(given).is_absolute():
        yield Path(given) / NAME
    if (user := home()) is not None:
        yield user / ".cache" / NAME
    for folder in _temporary():
        yield folder / f"{NAME}-{os.geteuid()}"


def folders(kind: str) -> Iterator[Path]:
    """The folders `kind` of this user's caches that can be written, best first; the last one goes with the process."""
    for place in places():
        if private(place) and private(place / kind):
            yield place / kind
    own = _own()
    if own is not None and private(own / kind):
        yield own / kind


def folder(kind: str) -> Path | None:
    """The first of `folders`; None where nothing can be written."""
    return next(folders(kind), None)


def _temporary() -> Iterator[Path]:
    for name in dict.fromkeys((variable("TMPDIR") or "/tmp", "/tmp", "/var/tmp")):
        if Path(name).is_absolute() and Path(name).is_dir():
            yield Path(name)


@cache
def _own() -> Path | None:
    """A new folder for this process alone, removed when it ends."""
    for place in _temporary():
        with suppress(OSError):
            made = Path(tempfile.mkdtemp(prefix=f"{NAME}-", dir=place))
            atexit.register(shutil.rmtree, made, ignore_errors=True)
            return made
    return None


def private(path: Path) -> bool:
    """Whether `path` is, now at the latest, a folder of this user that nobody else may enter, and can be written.

    It is made where it is missing, with the folders above it, whatever the umask. A link is followed if this user made
    it.
    """
    try:
        if not path.parent.is_dir():
            _make(path.parent)
        with suppress(FileExistsError):
            path.mkdir(0o700)
        above = path.parent.stat()
        if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
            return False  # anybody could put another folder in its place
        if path.lstat().st_uid != os.geteuid():
            return False
        about = path.stat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            return False
        if about.st_mode & 0o077:
            path.chmod(0o700)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def _make(path: Path) -> None:
    """Make a folder and those above it, closed to others."""
    if not path.parent.is_dir():
        _make(path.parent)
    with suppress(FileExistsError):
        path.mkdir(0o700)


def read(path: Path) -> bytes | None:
    """What `write` has put into a file; None where it is missing or not whole, or where others may write to it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(handle)
            theirs = about.st_uid != os.geteuid() or about.st_mode & 0o022
            if theirs or not stat.S_ISREG(about.st_mode):
                return None
            data = file.read()
    except OSError:
        return None
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(path: Path, content: bytes) -> None:
    """Put `content` and its digest into a file that only this user may read or write, all at once. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}-", dir=path.parent)
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
