"""Hashes that huggingface_hub keeps beside the files that it fetched, held against the files' bytes.

In its cache a file is a link to a blob that is named by its hash. A download into a folder of one's own leaves the hash
in `.cache/huggingface/download`, which counts as long as the file was not written after it.
"""

from __future__ import annotations

import hashlib
from io import BufferedReader
from pathlib import Path

from ..errors import CheckpointError
from ..hub.repository import blob_hash
from ..unchanged import UnchangedFile

_RECORD_LIMIT = 4096
_BLOCK = 1 << 20
SLACK = 1.0
"""Seconds by which a file may be younger than the record of its download, as huggingface_hub allows."""


def check_stated_hash(file: UnchangedFile) -> None:
    """Refuse a file whose bytes are not those of the hash that is stated for it; CheckpointError."""
    stated = stated_hash(file.path)
    if stated is None:
        return
    found = file.sha256() if len(stated) == 64 else _git_hash(file)
    if found != stated:
        raise CheckpointError(
            f"its bytes have the hash {found}, but huggingface_hub fetched {stated}: they changed on the disk",
            file=file.path,
            hint="delete the file, and the blob that it links to, and fetch it again with `hf download`",
        )


def stated_hash(path: Path) -> str | None:
    """What is stated for a file: a SHA-256, for small files git's SHA-1 of a blob, or None where nothing is."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs":
        return blob_hash(blob.name)
    record = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        with record.open("rb") as f:
            _, etag, time = f.read(_RECORD_LIMIT).decode("ascii").split("\n")[:3]
        return blob_hash(etag.strip()) if path.stat().st_mtime - SLACK <= float(time) else None
    except (OSError, ValueError):
        return None


def _git_hash(file: UnchangedFile) -> str:
    """Git's name of the file's content, which is not meant to be safe against forgery."""

    def digest(f: BufferedReader) -> str:
        sha1 = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        while block := f.read(_BLOCK):
            sha1.update(block)
        return sha1.hexdigest()

    return file.read(digest)
