"""Single files of a repository in huggingface_hub's cache: verified when they are fetched, or as the cache has them.

With HF_HUB_OFFLINE the cached snapshot of the repository is used, and nothing is asked of the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import HubError
from .cache import fetched, is_broken
from .client import Hub
from .repository import is_plain
from .settings import offline

_NOT_CACHED = "is not in the cache, and HF_HUB_OFFLINE is set"


def fetch_file(repository: str, name: str, revision: str | None = None, *, hub: Hub | None = None) -> Path:
    """One file of a repository, verified; its folder is named by the resolved commit. Raises HubError."""
    found = fetch_files(repository, (name,), revision, hub=hub)
    if name not in found:
        problem = _NOT_CACHED if offline() else "there is no such file in this revision"
        raise HubError(problem, file=f"{repository}/{name}")
    return found[name]


def fetch_files(
    repository: str, names: Iterable[str], revision: str | None = None, *, hub: Hub | None = None
) -> dict[str, Path]:
    """Those of `names` that a repository has, as {name: path in huggingface_hub's cache}. Raises HubError."""
    if offline():
        folder = snapshot(repository, revision)
        found = {n: folder / n for n in names if is_plain(n) and (folder / n).is_file()}
        for path in found.values():
            if is_broken(path):
                hint = "unset HF_HUB_OFFLINE, so that the file is fetched again, or delete it from the cache"
                raise HubError("its bytes in the cache are not those of its hash", file=path, hint=hint)
        return found
    hub = hub or Hub()
    resolved = hub.resolve(repository, revision)
    return {n: fetched(hub, resolved, resolved.file(n)) for n in names if n in resolved.files}


def snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a repository's files in huggingface_hub's cache; HubError where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        hint = "unset it, or fetch the repository with `hf download` first"
        raise HubError(_NOT_CACHED, file=repository, hint=hint) from None
