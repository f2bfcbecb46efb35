"""Compiled kernels on disk: one file per content, in the user's cache folder, safe for processes that build at once.

The key is a hash of everything that the result depends on; a file appears under its name only when it is whole.
Depends on errors only.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ...formats.errors import BackendError


def folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/mq-quant, or ~/.cache/mq-quant."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mq-quant" / "kernels"


def key(parts: Iterable[str | bytes]) -> str:
    """A name for the content that `parts` determine; where one part ends matters."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:40]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The file `name` of the cache, made by `build(path)` where it is missing.

    BackendError where the folder is not writable.
    """
    path = folder() / name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
            made = Path(scratch) / name
            build(made)
            made.replace(path)
    except OSError as e:
        raise BackendError(
            f"compiled kernels cannot be kept: {e.strerror or e}",
            file=path.parent,
            hint="point XDG_CACHE_HOME at a writable folder",
        ) from None
    return path
