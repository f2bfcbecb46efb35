"""What is asked of the hub: one resolved revision, byte ranges, and whole files that are verified before they count.

Requests go through huggingface_hub's session, so its token, endpoint and offline settings hold. Every request is
retried with growing pauses; what comes is held against the size and hash that the hub itself states. Nothing from a
repository is ever executed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import HubError

T = TypeVar("T")

ATTEMPTS = 7
LONGEST_PAUSE = 60.0
PROGRESS = 1 << 20
CHUNK = 1 << 20
PART = ".part"
"""The ending of a file that is not whole yet."""
_BUSY = (408, 429, 500, 502, 503, 504)
_COMMIT = re.compile("[0-9a-f]{40}")
_TOKEN = "set HF_TOKEN to a token that may read it"


@dataclass(frozen=True)
class Remote:
    """One file of a repository as the hub states it: `sha256` for large files, `blob_id` (git SHA-1) for the others."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    def digest(self) -> Any:
        """A hash object whose hexdigest over the whole file must equal `expected`."""
        return (
            hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        )

    @property
    def expected(self) -> str | None:
        return self.sha256 or self.blob_id


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    name: str
    commit: str
    files: Mapping[str, Remote]

    def file(self, name: str) -> Remote:
        if name not in self.files:
            raise HubError(f"revision {self.commit[:12]} has no such file", file=f"{self.name}/{name}")
        return self.files[name]


class _AgainError(Exception):
    """A fault that may pass; `wait` are the seconds that the server asked for."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    )


@dataclass(frozen=True)
class Hub:
    """A hub endpoint (HF_ENDPOINT, or the default one); `pause` is the first pause between attempts in seconds."""

    endpoint: str | None = field(default_factory=lambda: os.environ.get("HF_ENDPOINT") or None)
    pause: float = 1.0
    stop: threading.Event = field(default_factory=threading.Event)

    def resolve(self, name: str, revision: str | None = None) -> Repository:
        """Fix a branch, tag or commit (default: the main branch) to one commit and list its files; HubError."""
        from huggingface_hub import HfApi, ModelInfo
        from huggingface_hub.errors import HFValidationError

        api = HfApi(endpoint=self.endpoint)

        def attempt() -> ModelInfo:
            try:
                return api.model_info(name, revision=revision, files_metadata=True, timeout=30)
            except HFValidationError:
                raise
            except (
                ValueError,
                TypeError,
                KeyError,
                AttributeError,
            ) as e:  # how the package takes other answers
                hint = "check HF_ENDPOINT, and whether the network asks for a login"
                problem = f"what answered does not speak the hub's API: {e!r}"[:300]
                raise HubError(problem, file=name, hint=hint) from None

        info = self._retried(name, attempt)
        files = {}
        for s in info.siblings or ():
            size, sha256 = (s.lfs.size, s.lfs.sha256) if s.lfs else (s.size, None)
            if not isinstance(s.rfilename, str) or type(size) is not int or size < 0:
                raise HubError(f"the hub states no size for {s.rfilename!r}", file=name)
            files[s.rfilename] = Remote(s.rfilename, size, sha256, s.blob_id)
        if not (isinstance(info.sha, str) and _COMMIT.fullmatch(info.sha) and files):
            raise HubError("the hub states no commit, or no files, for this repository", file=name)
        return Repository(name, info.sha, files)

    def read(self, repository: Repository, remote: Remote, start: int, stop: int) -> bytes:
        """Bytes start to stop of a remote file; HubError where they cannot be had."""

        def attempt() -> bytes:
            data = bytearray()
            for chunk in self._stream(repository, remote, start, stop):
                data += chunk
                if len(data) >= stop - start:
                    break
            if len(data) < stop - start:
                raise _AgainError(f"the connection ended after {len(data)} of {stop - start} bytes")
            return bytes(data[: stop - start])

        return self._retried(f"{repository.name}/{remote.name}", attempt)

    def download(self, repository: Repository, remote: Remote, target: Path) -> None:
        """Fetch a whole file to `target`, resuming what an earlier attempt left; it appears only once verified."""
        part = target.with_name(target.name + PART)
        self._retried(
            f"{repository.name}/{remote.name}",
            lambda: self._attempt(repository, remote, part),
            gained=lambda: part.stat().st_size if part.exists() else 0,
        )
        part.replace(target)

    def _attempt(self, repository: Repository, remote: Remote, part: Path) -> None:
        digest, start = remote.digest(), 0
        if part.exists() and part.stat().st_size <= remote.size:
            with part.open("rb") as f:
                while chunk := f.read(CHUNK):
                    digest.update(chunk)
                start = f.tell()
        done = start
        with part.open("r+b" if start else "wb") as f:
            f.seek(start)
            for chunk in self._stream(repository, remote, start, remote.size) if start < remote.size else ():
                if self.stop.is_set():
                    raise HubError("the download was stopped", file=f"{repository.name}/{remote.name}")
                done += len(chunk)
                if done > remote.size:
                    break
                digest.update(chunk)
                f.write(chunk)
        if done < remote.size:
            raise _AgainError(f"the connection ended after {done} of {remote.size} bytes")
        if done > remote.size or digest.hexdigest() != remote.expected:
            part.unlink()
            what = (
                "more bytes came than"
                if done > remote.size
                else f"its hash is {digest.hexdigest()}, not what"
            )
            raise _AgainError(f"{what} the hub states")

    def verify(self, remote: Remote, path: Path) -> bool:
        """Whether a file on disk is the remote one, by size and hash."""
        digest = remote.digest()
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
            return f.tell() == remote.size and digest.hexdigest() == remote.expected

    def small_file(self, repository: Repository, remote: Remote) -> Path:
        """A file by way of huggingface_hub's cache, verified; HubError where it cannot be had."""
        from huggingface_hub import hf_hub_download

        def attempt(force: bool = False) -> Path:
            return Path(
                hf_hub_download(
                    repository.name,
                    remote.name,
                    revision=repository.commit,
                    endpoint=self.endpoint,
                    force_download=force,
                )
            )

        where = f"{repository.name}/{remote.name}"
        path = self._retried(where, attempt)
        if not self.verify(remote, path):
            path = self._retried(where, lambda: attempt(force=True))
            if not self.verify(remote, path):
                raise HubError("what came is not what the hub states: its hash differs", file=where)
        return path

    def cached(self, repository: Repository, remote: Remote) -> Path | None:
        """A file's place in huggingface_hub's cache, if it is there whole and verified."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository.name, remote.name, revision=repository.commit)
        path = Path(found) if isinstance(found, str) else None
        return path if path is not None and path.is_file() and self.verify(remote, path) else None

    def _stream(self, repository: Repository, remote: Remote, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(repository.name, remote.name, revision=repository.commit, endpoint=self.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        whole = (start, stop) == (0, remote.size)
        if not whole:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            for answer in (*response.history, response):
                commit = answer.headers.get("x-repo-commit", repository.commit)
                if commit != repository.commit:
                    raise HubError(
                        f"the hub answered for revision {commit[:12]}, not {repository.commit[:12]}",
                        file=f"{repository.name}/{remote.name}",
                        hint="the repository changed; start again",
                    )
            if not whole and response.status_code != 206 and start:
                raise _AgainError(f"the hub ignored a range and answered {response.status_code}")
            yield from response.iter_raw()

    def _retried(self, what: str, attempt: Callable[[], T], gained: Callable[[], int] = lambda: 0) -> T:
        """Call `attempt` until it succeeds, at most ATTEMPTS times; ones that gained PROGRESS bytes are not counted."""
        failures, pause, last = 0, self.pause, ""
        while failures < ATTEMPTS:
            before = gained()
            if self.stop.is_set():
                raise HubError("the download was stopped", file=what)
            try:
                with _faults(what):
                    return attempt()
            except _AgainError as e:
                last = str(e)
                if gained() - before >= PROGRESS:
                    continue
                self.stop.wait(min(max(pause, e.wait), LONGEST_PAUSE))
                failures, pause = failures + 1, pause * 2
        raise HubError(
            f"{last} ({ATTEMPTS} attempts)",
            file=what,
            hint="check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache",
        )


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn every fault of huggingface_hub, its transport and the disk into HubError or into another attempt."""
    from huggingface_hub import errors, get_session

    transport = sys.modules[type(get_session()).__module__.partition(".")[0]].HTTPError
    try:
        yield
    except errors.GatedRepoError:
        hint = f"accept its terms on the hub's page of the model, and {_TOKEN}"
        raise HubError("access to this repository is restricted", file=what, hint=hint) from None
    except errors.OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE forbids the network", file=what) from None
    except errors.LocalEntryNotFoundError as e:  # how the package reports that the hub did not answer
        raise _AgainError(f"the hub did not answer: {e.__cause__ or 'no connection'}") from None
    except errors.RepositoryNotFoundError:
        hint = f"check the name; if it is private, {_TOKEN}"
        raise HubError("there is no such repository, or no access to it", file=what, hint=hint) from None
    except errors.RevisionNotFoundError:
        raise HubError("there is no such revision", file=what) from None
    except errors.EntryNotFoundError:
        raise HubError("there is no such file in this revision", file=what) from None
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status not in _BUSY:
            advice = _TOKEN if status in (401, 403) else None
            raise HubError(f"the hub answered {status}", file=what, hint=advice) from None
        wait = e.response.headers.get("retry-after", "")
        raise _AgainError(f"the hub answered {status}", float(wait) if wait.isdecimal() else 0.0) from None
    except errors.HFValidationError as e:
        raise HubError(str(e), file=what, hint="a repository's name is owner/name") from None
    except transport as e:
        raise _AgainError(f"the connection failed: {e or type(e).__name__}") from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or lower --shard-cache"
            raise HubError("the disk is full", file=what, hint=hint) from None
        if e.errno is not None and not isinstance(e, ConnectionError | TimeoutError):
            raise HubError(f"cannot be stored: {e.strerror}", file=what) from None
        raise _AgainError(f"the transfer failed: {e}") from None
