"""The folder in which the shards of one streamed checkpoint lie while they are needed: ours alone, and locked.

A run that was killed leaves its folder behind; the next run of the same commit takes it over with what is in it.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import HubError, InUseError, MqError
from ..file_lock import FileLock

LOCK = "lock"
MOST = 64
"""Folders of one commit that are tried: others are used by runs of their own, or are not to be trusted."""


class Scratch:
    """A folder `.mq-quant-COMMIT-N`, locked until `close`, which removes it. A link is never followed."""

    def __init__(self, folder: Path, commit: str) -> None:
        """Take the first N that is free, under `folder`, which is made where it is missing. Raises HubError."""
        for n in range(MOST):
            self.path, made = folder / f".mq-quant-{commit[:12]}-{n}", False
            try:
                made = _make(self.path)
                if made or _is_ours(self.path):
                    self._lock = FileLock(self.path / LOCK)
                    return
            except OSError as e:
                problem = f"cannot be made: {e.strerror}"
                raise HubError(problem, file=self.path, hint="shards are kept there") from None
            except InUseError:
                continue
            except MqError as e:
                if made:
                    shutil.rmtree(self.path, ignore_errors=True)
                    raise HubError(e.problem, file=e.file, hint=e.hint) from None
        hint = "remove the folders .mq-quant-… that no running program uses"
        raise HubError(f"none of {MOST} scratch folders can be used", file=folder, hint=hint)

    def close(self) -> None:
        """Remove the folder with what is in it, and let go of its name."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        with suppress(OSError):  # a network share removes a file that is open only now
            self.path.rmdir()


def _make(path: Path) -> bool:
    """Make a folder that only we can enter; false where something is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _is_ours(path: Path) -> bool:
    """Whether a name is that of a folder, not of a link, and nobody else's: a network share may own all its files."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (os.geteuid(), path.parent.stat().st_uid)
