"""Compiled kernels on disk: one file per content, safe for processes that build at once.

The key is a hash of everything that the code depends on. A file appears under its name only when it is whole, and its
content is checked each time before it is used (`formats.cache`).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ...formats import cache as disk
from ...formats.errors import BackendError

KIND = "kernels"


def key(parts: Iterable[str | bytes]) -> str:
    """A name for the content that `parts` determine; where one part ends matters."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:40]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The file `name` of the cache, made by `build(path)` where it is missing or not whole.

    Behind what `build` wrote, the file holds a digest, which loaders of libraries do not mind. Raises BackendError
    where no folder can be written.
    """
    return _find(name, build)[0]


def code(name: str, build: Callable[[Path], None]) -> bytes:
    """What `build(path)` wrote, now or in an earlier run. Raises BackendError where no folder can be written."""
    return _find(name, build)[1]


def _find(name: str, build: Callable[[Path], None]) -> tuple[Path, bytes]:
    problem = "no folder can be written"
    for folder in disk.folders(KIND):
        path = folder / name
        content = disk.read(path)
        if content is not None:
            return path, content
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
                made = Path(scratch) / name
                build(made)
                content = made.read_bytes()
            disk.write(path, content)
        except OSError as e:
            problem = f"{e.strerror or e} in {folder}"
            continue
        return path, content
    tried = ", ".join(map(str, disk.places())) or "none"
    raise BackendError(
        f"compiled kernels cannot be kept: {problem}",
        hint=f"point XDG_CACHE_HOME at a folder that you can write and nobody else; tried: {tried}",
    )
