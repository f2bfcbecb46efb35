"""A repository at one commit and its files, as the hub states them: names, sizes in bytes, and hashes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HubError

CHUNK = 1 << 20
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")
_SHA1 = re.compile("[0-9a-f]{40}")


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

    def lies_at(self, path: Path) -> bool:
        """Whether a file lies at `path` that has the size and the hash that the hub states."""
        digest = self.digest()
        try:
            with path.open("rb") as f:
                if os.fstat(f.fileno()).st_size != self.size:
                    return False
                while chunk := f.read(CHUNK):
                    digest.update(chunk)
        except OSError:
            return False
        return bool(digest.hexdigest() == self.expected)


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    name: str
    commit: str
    files: Mapping[str, Remote]

    def file(self, name: str) -> Remote:
        """A file by its name. HubError: it is not there, or its name or its missing hash makes it unusable."""
        where = f"{self.name}/{name}"
        if name not in self.files:
            raise HubError(f"revision {self.commit[:12]} has no such file", file=where)
        if not is_plain(name):
            raise HubError("the name leads out of the repository, or cannot be a file's name", file=where)
        if self.files[name].expected is None:
            hint = (
                "the address in HF_ENDPOINT must answer as the hub does, with sha256 or blobId of each file"
            )
            raise HubError(
                "the hub states no hash for this file, so it cannot be checked", file=where, hint=hint
            )
        return self.files[name]


def blob_hash(name: str) -> str | None:
    """A blob's name in huggingface_hub's cache, if it can be the hash of the content: SHA-256, or git's SHA-1.

    No hash begins with sixteen zeros; such a name is a number that a tool has counted up.
    """
    can_be = (_SHA256.fullmatch(name) or _SHA1.fullmatch(name)) and not name.startswith("0" * 16)
    return name if can_be else None


def is_plain(name: str) -> bool:
    """Whether a name that the hub states is a relative path that stays inside its folder on any machine."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not {"", ".", ".."} & set(parts)
        and not set(name) & {"\\", "\0"}
        and not PurePosixPath(name).is_absolute()
        and all(len(part.encode("utf-8", "surrogatepass")) <= 255 for part in parts)
    )


def is_commit(revision: str) -> bool:
    """Whether a revision is the name of a commit: no branch or tag can mean another one some day."""
    return _COMMIT.fullmatch(revision) is not None


def parse_files(name: str, entries: Iterable[Any]) -> dict[str, Remote] | None:
    """{file name: Remote} of the hub's list of files; None where it lacks sizes. HubError where it is no such list."""
    files: dict[str, Remote] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise HubError("the hub states no files for this repository, but something else", file=name)
        if entry.get("type", "file") != "file":
            continue
        remote = _parse_file(name, entry)
        if remote is None:
            return None
        if files.setdefault(remote.name, remote) != remote:
            raise HubError(
                f"the hub states the file {remote.name!r} twice, with different content", file=name
            )
    return files


def _parse_file(name: str, entry: Mapping[str, Any]) -> Remote | None:
    """One entry, of either list that the hub has: `rfilename`, `blobId`, `lfs.sha256`, or `path`, `oid`, `lfs.oid`."""
    file = entry.get("rfilename", entry.get("path"))
    large = entry.get("lfs")
    if large is not None and not isinstance(large, dict):
        raise HubError(f"the hub states no size for {file!r}", file=name)
    size = large.get("size") if large else entry.get("size")
    if isinstance(file, str) and size is None and large is None:
        return None
    if not isinstance(file, str) or type(size) is not int or size < 0:
        raise HubError(f"the hub states no size for {file!r}", file=name)
    sha256 = _hash(_SHA256, large.get("sha256", large.get("oid"))) if large else None
    blob = None if large else _hash(_SHA1, entry.get("blobId", entry.get("oid")))
    return Remote(file, size, sha256, blob)


def _hash(pattern: re.Pattern[str], value: Any) -> str | None:
    return value.lower() if isinstance(value, str) and pattern.fullmatch(value.lower()) else None
