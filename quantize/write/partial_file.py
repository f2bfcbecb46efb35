"""The output under its temporary name: reserved on the disk before work, written at offsets, renamed when complete.

Nothing ever stands half-written under the final name. Depends on errors.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...formats.errors import OutputError

PARTIAL = ".partial"
JOURNAL = ".partial.journal"
CALIBRATION = ".partial.calibration"


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def check_output(path: Path, total_bytes: int, force: bool, extra_bytes: int = 0) -> None:
    """Refuse, before any work, an output that exists, has no folder, or does not fit on its disk.

    `extra_bytes` is what else the build will store on that disk (the shard cache). Raises OutputError.
    """
    if path.is_dir():
        raise OutputError("is a folder", file=path, hint="give --output a file name")
    if path.exists() and not force:
        raise OutputError("exists already", file=path, hint="give --force to replace it, or another --output")
    if not path.parent.is_dir():
        raise OutputError("its folder does not exist", file=path, hint=f"mkdir -p {path.parent}")
    partial = beside(path, PARTIAL)
    held = partial.stat().st_blocks * 512 if partial.exists() else 0
    free, needed = shutil.disk_usage(path.parent).free, total_bytes + extra_bytes
    if free + held < needed:
        raise OutputError(
            f"needs {needed / 1e9:.1f} GB and its disk has {(free + held) / 1e9:.1f} GB free",
            file=path,
            hint="free some space, or give an --output on another disk",
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing `path` into an OutputError."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                "the disk is full",
                file=path,
                hint="free some space and run the same command again: it continues where it stopped",
            ) from None
        raise OutputError(f"cannot be written: {e.strerror}", file=path) from None


class PartialOutput:
    """The file being written at `<name>.partial`; its size is reserved when it is opened."""

    def __init__(self, final: Path, total_bytes: int) -> None:
        """Open or create the partial file and reserve its space; OutputError where the disk is full."""
        self.final, self.path = final, beside(final, PARTIAL)
        with disk_errors(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(self._fd, 0, total_bytes)
                os.ftruncate(self._fd, total_bytes)
            except BaseException:
                os.close(self._fd)
                raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        with disk_errors(self.path):
            while data:
                n = os.pwrite(self._fd, data, offset)
                data, offset = data[n:], offset + n

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` at `offset`; the file has its full size from the start."""
        parts = []
        while nbytes:
            part = os.pread(self._fd, nbytes, offset)
            if not part:
                raise OutputError("has become shorter while it was written", file=self.path)
            parts.append(part)
            offset, nbytes = offset + len(part), nbytes - len(part)
        return b"".join(parts)

    def sync(self) -> None:
        with disk_errors(self.path):
            os.fsync(self._fd)

    def commit(self) -> None:
        """Sync, give the file its final name, and make the name durable."""
        self.sync()
        self.path.rename(self.final)
        folder = os.open(self.final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        os.close(self._fd)
