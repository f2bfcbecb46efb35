"""The bytes of a repository's files: ranges of them, and whole files, which count once their hash is right.

A transfer that breaks off continues where it ended. Where a server cannot continue (it ignores ranges, or its copy is
another one), the file is fetched again from its first byte.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from ..errors import HubError
from . import settings
from .answers import RangeError, body_start
from .patience import AgainError
from .repository import CHUNK, Remote, Repository
from .session import Answer, Line, ask

PART = ".part"
"""The ending of a file that is not whole yet."""
HASH_TRIES = 4
"""Attempts where a whole file arrives with another hash: each costs the whole file."""
_MIRROR = (
    "the server's copy is not the file that the hub lists; if HF_ENDPOINT names a mirror, try the hub itself"
)
_FULL = "free some space; a build from the hub needs room for as many shards as --shard-cache says"
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full: the quota is used up",
    errno.EFBIG: "the file is larger than this system lets a file be",
}


@dataclass(frozen=True)
class Transfer:
    """One file of a repository on its way through `line`."""

    line: Line
    repository: Repository
    remote: Remote

    @property
    def what(self) -> str:
        """The file, as errors name it."""
        return f"{self.repository.name}/{self.remote.name}"

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop of the file, which no hash vouches for. Raises HubError."""
        data, whole = bytearray(), False

        def attempt() -> None:
            nonlocal whole
            at = start + len(data)
            try:
                with self._body(at, stop, whole) as (begin, answer):
                    if answer.status != 206 and answer.length not in (None, self.remote.size):
                        raise _short(answer.length or 0, self.remote.size, answer)
                    skip = at - begin
                    for chunk in answer.chunks:
                        data.extend(chunk[skip:])
                        skip = max(skip - len(chunk), 0)
                        if len(data) >= stop - start:
                            return
            except RangeError:
                whole = True
                raise
            raise _short(len(data), stop - start, answer)

        if start < stop:
            self.line.retried(self.what, attempt, lambda: len(data))
        return bytes(data[: stop - start])

    def download(self, target: Path) -> None:
        """Fetch the whole file to `target`, continuing what lies at `target` with the ending PART.

        `target` appears once the hash is right. Raises HubError, also where the disk cannot take the file.
        """
        part, whole = target.with_name(target.name + PART), False

        def attempt() -> None:
            nonlocal whole
            try:
                self._complete(part, whole)
            except RangeError:
                part.unlink(missing_ok=True)
                whole = True
                raise

        with _disk(self.what):
            if part.is_symlink():
                part.unlink()
            self.line.retried(self.what, attempt, lambda: part.stat().st_size if part.exists() else 0)
            part.replace(target)

    def _complete(self, part: Path, whole: bool) -> None:
        """Bring `part` to the file's size and check its hash; with `whole`, from the first byte and without a range."""
        digest, done = self.remote.digest(), 0
        if not whole and part.is_file() and part.stat().st_size <= self.remote.size:
            with _open(part, os.O_RDONLY) as f:
                while chunk := f.read(CHUNK):
                    digest.update(chunk)
                done = f.tell()
        if done < self.remote.size or not done:
            with _open(part, os.O_RDWR | os.O_CREAT) as f:
                digest, done = self._receive(f, digest, done, whole)
        if done < self.remote.size:
            raise _short(done, self.remote.size)
        if digest.hexdigest() != self.remote.expected:
            part.unlink()
            problem = f"its hash is {digest.hexdigest()}, not what the hub states"
            raise AgainError(problem, tries=HASH_TRIES, hint=_MIRROR, content=True)

    def _receive(self, f: BinaryIO, digest: Any, done: int, whole: bool) -> tuple[Any, int]:
        """Put what the hub sends behind the first `done` bytes of `f`; the digest and the size after that."""
        if not self.remote.size:
            f.truncate(0)
            return digest, 0
        with self._body(done, self.remote.size, whole) as (begin, answer):
            if begin < done:
                digest, done = self.remote.digest(), 0
            f.truncate(done)
            f.seek(done)
            for chunk in answer.chunks:
                self.line.patience.check(self.what)
                done += len(chunk)
                if done > self.remote.size:
                    raise _long(f"more than {self.remote.size}", self.remote, answer)
                digest.update(chunk)
                f.write(chunk)
        return digest, done

    @contextmanager
    def _body(self, start: int, stop: int, whole: bool) -> Iterator[tuple[int, Answer]]:
        """The answer that brings bytes start to stop, and the place in the file of its first byte: `start` or 0."""
        name, commit = quote(self.repository.name), self.repository.commit
        url = f"{self.line.endpoint.url}/{name}/resolve/{commit}/{quote(self.remote.name)}"
        span = None if whole or (start, stop) == (0, self.remote.size) else f"bytes={start}-{stop - 1}"
        with ask(self.line, self.what, url, settings.read_seconds(), span) as answer:
            for other in answer.commits:
                if other != commit:
                    problem = f"the hub answered for revision {other[:12]}, not {commit[:12]}"
                    raise HubError(problem, file=self.what, hint="the repository changed; start again")
            if answer.packed and answer.status == 206:
                raise RangeError(
                    "the part that was asked for came packed", host=answer.asked.host, content=True
                )
            begin = body_start(answer.asked, answer.status, answer.headers, start, self.remote.size)
            if answer.status != 206 and (answer.length or 0) > self.remote.size:
                raise _long(str(answer.length), self.remote, answer)
            yield begin, answer


def _short(came: int, size: int, answer: Answer | None = None) -> AgainError:
    problem, host = (
        f"the connection ended after {came} of {size} bytes",
        answer.asked.host if answer else None,
    )
    return AgainError(problem, host=host, hint=_MIRROR, content=True)


def _long(came: str, remote: Remote, answer: Answer) -> RangeError:
    problem = f"more bytes came than the hub states: {came}, not {remote.size}"
    return RangeError(problem, host=answer.asked.host, hint=_MIRROR, content=True)


def _open(path: Path, flags: int) -> BinaryIO:
    """Open a file that is ours; a link in its place is not followed (OSError)."""
    return os.fdopen(os.open(path, flags | os.O_NOFOLLOW, 0o666), "rb" if flags == os.O_RDONLY else "r+b")


@contextmanager
def _disk(what: str) -> Iterator[None]:
    """Turns the faults of the disk into HubError."""
    try:
        yield
    except OSError as e:
        if e.errno in _DISK:
            raise HubError(_DISK[e.errno], file=what, hint=_FULL) from None
        raise HubError(f"cannot be stored: {e.strerror or e}", file=e.filename or what) from None
