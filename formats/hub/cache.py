"""huggingface_hub's cache of files, read and written in its own layout, and checked by hash before anything is used.

A file lies at `models--owner--name/snapshots/COMMIT/NAME`: a link to `blobs/HASH`, or the file itself where the file
system has no links. Other programs read and write the same folder, so nothing here is changed in place.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from ..errors import HubError
from .client import Hub
from .repository import Remote, Repository, blob_hash, is_commit
from .settings import cache_folder


def cached(repository: Repository, remote: Remote) -> Path | None:
    """A file's place in the cache, if it is there whole, with the hash that the hub states."""
    root = cache_folder()
    place = _place(root, repository, remote) if root else None
    return place if place and remote.lies_at(place) else None


def fetched(hub: Hub, repository: Repository, remote: Remote) -> Path:
    """A file in the cache, fetched where it is not there or not whole. Raises HubError.

    Where the cache cannot be written, the file lies in a folder that is removed when this process ends.
    """
    root, problem = cache_folder(), "there is no home folder"
    if root is not None:
        try:
            return _fetched(hub, repository, remote, root)
        except OSError as e:
            problem = f"{e.filename or root} cannot be written: {e.strerror}"
    hub.notify(f"{repository.name}: {problem}; HF_HOME can name another folder for files that are to be kept")
    try:
        return _fetched(hub, repository, remote, _passing_folder())
    except OSError as e:
        hint = "HF_HOME names the folder of the cache; it must be one that can be written"
        raise HubError(f"cannot be stored: {e.strerror}", file=e.filename, hint=hint) from None


def _fetched(hub: Hub, repository: Repository, remote: Remote, root: Path) -> Path:
    """As `fetched`, in a cache at `root`. Raises HubError, and OSError where the folder cannot be written."""
    place = _place(root, repository, remote)
    if remote.lies_at(place):
        return place
    blob = root / _name(repository) / "blobs" / str(remote.expected)
    for folder in (blob.parent, place.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{remote.expected}.", dir=blob.parent) as own:
        fresh = Path(own) / "file"
        hub.download(repository, remote, fresh)
        _put(fresh, blob, place)
    return place


@functools.cache
def _passing_folder() -> Path:
    """A folder of this process's own, removed when it ends. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix="mq-quant-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_broken(place: Path) -> bool:
    """Whether a file in the cache links to a blob whose bytes are not those of its name: they changed on the disk."""
    blob = place.resolve()
    stated = blob_hash(blob.name) if place.is_symlink() and blob.parent.name == "blobs" else None
    if stated is None:
        return False
    large = len(stated) == 64
    remote = Remote(place.name, blob.stat().st_size, stated if large else None, None if large else stated)
    return not remote.lies_at(blob)


def snapshot_of(folder: Path) -> tuple[str, str] | None:
    """(repository, commit) of a folder that is a snapshot in a cache of huggingface_hub's; None for any other."""
    path = folder.resolve()
    kind, *names = path.parent.parent.name.split("--")
    inside = kind == "models" and path.parent.name == "snapshots" and is_commit(path.name)
    return ("/".join(names), path.name) if inside and len(names) in (1, 2) and all(names) else None


def _put(fresh: Path, blob: Path, place: Path) -> None:
    """Give a whole file its name in the cache: as a blob with a link to it, or itself where there are no links."""
    link = fresh.with_name("link")
    try:
        link.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:
        fresh.replace(place)
        return
    fresh.replace(blob)
    link.replace(place)


def _place(root: Path, repository: Repository, remote: Remote) -> Path:
    return root / _name(repository) / "snapshots" / repository.commit / remote.name


def _name(repository: Repository) -> str:
    return "--".join(("models", *repository.name.split("/")))
