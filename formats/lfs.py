"""Pointer files of Git LFS: small texts that stand where a large file should be after a clone without LFS."""

from __future__ import annotations

HEAD_BYTES = 64
"""The first bytes of a file that `is_pointer` needs."""
PROBLEM = "is a pointer file of Git LFS: the file itself was not fetched"
HINT = "fetch it with `git lfs pull` or `hf download`"

_BEGINNINGS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"# xet version",
)


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with `head` is such a pointer."""
    return head.startswith(_BEGINNINGS)
