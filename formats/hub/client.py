"""What is asked of the hub: a repository at one commit, byte ranges, and whole files that count once verified.

Requests go through huggingface_hub's session, so that its token, endpoint and offline settings hold. What fails and
may pass is asked for again; what arrives is held against the size and the hash that the hub itself states. Nothing
from a repository is ever executed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urljoin

from ..errors import HubError
from . import settings
from .answers import LOGIN, LOGIN_TRIES, RangeError, body_start
from .endpoint import origin, parse_endpoint, shown
from .patience import AgainError, Patience
from .repository import CHUNK, Remote, Repository, parse_commit, parse_files
from .session import Answer, Caller, ask, knock

T = TypeVar("T")

PART = ".part"
"""The ending of a file that is not whole yet."""
LISTING_BYTES = 64 << 20
LISTING_PAGES = 1000
LISTING_SECONDS = 20.0
_NEXT = re.compile(r'<([^>]*)>\s*;[^,]*\brel\s*=\s*"?next\b')

log = logging.getLogger(__name__)


class Hub:
    """A hub at an address (default: HF_ENDPOINT's, else huggingface.co). Safe for several threads.

    `pause` is the first pause between attempts, in seconds. `notify` is handed a line whenever a wait becomes long;
    by default that is a warning of Python's logging, which reaches stderr. Setting `stop` ends all transfers. Raises
    HubError where the address is none.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        pause: float = 1.0,
        notify: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.endpoint = parse_endpoint(endpoint or settings.address())
        self.stop = stop or threading.Event()
        self.notify = notify or log.warning
        self._patience = Patience(pause, self.stop, self.notify)

    def resolve(self, name: str, revision: str | None = None) -> Repository:
        """Fix a branch, tag or commit (default: the main branch) to one commit and list its files; HubError."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(name)
        except HFValidationError as e:
            raise HubError(str(e), file=name, hint="a repository's name is owner/name") from None
        model = f"{self.endpoint.url}/api/models/{quote(name)}"
        info, _ = self._json(
            name, model + (f"/revision/{quote(revision, safe='')}" if revision else "") + "?blobs=true"
        )
        if not isinstance(info, dict):
            raise _not_the_hub(name)
        commit = parse_commit(name, info)
        files = parse_files(name, _entries(name, info.get("siblings")))
        if files is None:
            files = parse_files(name, self._tree(name, f"{model}/tree/{commit}?recursive=true"))
        if not files:
            raise HubError("the hub states no commit, or no files, for this repository", file=name)
        return Repository(name, commit, files)

    def read(self, repository: Repository, remote: Remote, start: int, stop: int) -> bytes:
        """Bytes start to stop of a remote file; HubError where they cannot be had."""
        data, whole = bytearray(), False

        def attempt() -> None:
            nonlocal whole
            at = start + len(data)
            try:
                with self._body(repository, remote, at, stop, whole) as (begin, answer):
                    if answer.status != 206 and answer.length not in (None, remote.size):
                        raise _short(answer.length or 0, remote.size, answer)
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
            self._retried(f"{repository.name}/{remote.name}", attempt, lambda: len(data))
        return bytes(data[: stop - start])

    def download(self, repository: Repository, remote: Remote, target: Path) -> None:
        """Fetch a whole file to `target`, resuming what an earlier attempt left; it appears only once verified.

        The bytes go to `target` with the ending PART. Raises HubError, also where the disk cannot take them.
        """
        part, whole = target.with_name(target.name + PART), False

        def attempt() -> None:
            nonlocal whole
            try:
                self._attempt(repository, remote, part, whole)
            except RangeError:
                part.unlink(missing_ok=True)
                whole = True
                raise

        def gained() -> int:
            return part.lstat().st_size if part.exists() else 0

        what = f"{repository.name}/{remote.name}"
        with _disk(what):
            if part.is_symlink():
                part.unlink()
            self._retried(what, attempt, gained)
            part.replace(target)

    def ping(self, seconds: float) -> str:
        """Ask once whether anything answers at the hub's address; the address, without secrets. Raises HubError."""
        where = shown(self.endpoint.url)
        try:
            knock(self._caller(where, seconds))
        except AgainError as e:
            raise HubError(e.problem, file=where, hint=e.hint) from None
        return where

    def _attempt(self, repository: Repository, remote: Remote, part: Path, whole: bool) -> None:
        """Bring `part` to the remote's size and check its hash; with `whole`, ask for no range."""
        digest, done = remote.digest(), 0
        if not whole and part.is_file() and part.stat().st_size <= remote.size:
            with _open(part, os.O_RDONLY) as f:
                while chunk := f.read(CHUNK):
                    digest.update(chunk)
                done = f.tell()
        if done < remote.size or not done:
            with _open(part, os.O_RDWR | os.O_CREAT) as f:
                digest, done = self._receive(repository, remote, f, digest, done, whole)
        if done < remote.size:
            raise _short(done, remote.size)
        if digest.hexdigest() != remote.expected:
            part.unlink()
            problem = f"its hash is {digest.hexdigest()}, not what the hub states"
            raise AgainError(problem, hint=_MIRROR, content=True)

    def _receive(
        self, repository: Repository, remote: Remote, f: BinaryIO, digest: Any, done: int, whole: bool
    ) -> tuple[Any, int]:
        """Append what the hub sends to the `done` bytes of `f`; the digest and the size after that."""
        if not remote.size:
            f.truncate(0)
            return digest, 0
        with self._body(repository, remote, done, remote.size, whole) as (begin, answer):
            if begin < done:
                digest, done = remote.digest(), 0
            f.truncate(done)
            f.seek(done)
            for chunk in answer.chunks:
                if self.stop.is_set():
                    raise HubError("the download was stopped", file=f"{repository.name}/{remote.name}")
                done += len(chunk)
                if done > remote.size:
                    raise _long(f"more than {remote.size}", remote, answer)
                digest.update(chunk)
                f.write(chunk)
        return digest, done

    @contextmanager
    def _body(
        self, repository: Repository, remote: Remote, start: int, stop: int, whole: bool
    ) -> Iterator[tuple[int, Answer]]:
        """The answer that brings bytes start to stop, and the place in the file of its first byte: `start` or 0."""
        what = f"{repository.name}/{remote.name}"
        url = f"{self.endpoint.url}/{quote(repository.name)}/resolve/{repository.commit}/{quote(remote.name)}"
        span = None if whole or (start, stop) == (0, remote.size) else f"bytes={start}-{stop - 1}"
        with ask(self._caller(what, settings.read_seconds()), url, span) as answer:
            for commit in answer.commits:
                if commit != repository.commit:
                    problem = f"the hub answered for revision {commit[:12]}, not {repository.commit[:12]}"
                    raise HubError(problem, file=what, hint="the repository changed; start again")
            if answer.packed and answer.status == 206:
                raise RangeError(
                    "the part that was asked for came packed", host=answer.asked.host, content=True
                )
            begin = body_start(answer.asked, answer.status, answer.headers, start, remote.size)
            if answer.status != 206 and (answer.length or 0) > remote.size:
                raise _long(str(answer.length), remote, answer)
            yield begin, answer

    def _json(self, what: str, url: str) -> tuple[Any, Mapping[str, str]]:
        """The JSON value that `url` answers with, and the answer's headers; HubError."""

        def attempt() -> tuple[Any, Mapping[str, str]]:
            data = bytearray()
            with ask(self._caller(what, LISTING_SECONDS), url) as answer:
                for chunk in answer.chunks:
                    data.extend(chunk)
                    if len(data) > LISTING_BYTES:
                        raise HubError(
                            f"the hub's list of files has more than {LISTING_BYTES} bytes", file=what
                        )
            try:
                return json.loads(data), answer.headers
            except (ValueError, RecursionError):
                problem = "what answered does not speak the hub's API: it is not JSON"
                raise AgainError(
                    problem, host=answer.asked.host, tries=LOGIN_TRIES, hint=LOGIN, content=True
                ) from None

        return self._retried(what, attempt)

    def _tree(self, what: str, url: str) -> Iterator[Any]:
        """The entries of the hub's list of files, page after page, for hubs whose short answer lacks the sizes."""
        for _ in range(LISTING_PAGES):
            page, headers = self._json(what, url)
            yield from _entries(what, page)
            following = _NEXT.search(headers.get("link", ""))
            if following is None:
                return
            url = urljoin(url, following[1])
            if origin(url) != origin(self.endpoint.url):
                url = self.endpoint.url + "/api/" + url.partition("/api/")[2]
        raise HubError(f"the hub's list of files has more than {LISTING_PAGES} pages", file=what)

    def _caller(self, what: str, seconds: float) -> Caller:
        return Caller(self.endpoint, what, self._patience, seconds)

    def _retried(self, what: str, attempt: Callable[[], T], gained: Callable[[], int] = lambda: 0) -> T:
        return self._patience.retried(what, shown(self.endpoint.url), attempt, gained)


_MIRROR = (
    "the server's copy is not the file that the hub lists; if HF_ENDPOINT names a mirror, try the hub itself"
)


def _entries(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _not_the_hub(what)
    return value


def _not_the_hub(what: str) -> HubError:
    problem = "what answered does not speak the hub's API: it states no commit or no files"
    return HubError(problem, file=what, hint=LOGIN)


def _short(came: int, size: int, answer: Answer | None = None) -> AgainError:
    host = answer.asked.host if answer else None
    return AgainError(
        f"the connection ended after {came} of {size} bytes", host=host, hint=_MIRROR, content=True
    )


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
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            full = (
                "the disk is full"
                if e.errno != errno.EFBIG
                else "the file is larger than this system lets it be"
            )
            raise HubError(full, file=what, hint="free some space, or lower --shard-cache") from None
        raise HubError(f"cannot be stored: {e.strerror or e}", file=e.filename or what) from None
