"""The output while it is written: NAME.partial, its journal, and the running hash, under one lock.

The lock is taken before anything is looked at or removed. The file's space is reserved on the disk before work, bytes
are written at their offsets, and the open file gets its final name when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from ...formats.errors import OutputError
from ...formats.file_lock import OWNER
from ...formats.own_file import (
    NOT_OFFERED,
    copy_range,
    disk_errors,
    free_bytes,
    is_at,
    open_own,
    sync,
    sync_folder,
    write_all,
)
from ...formats.watch import UNWATCHED, Watch
from .journal import Journal, Record, Signature
from .running_hash import Payload, Range, RunningHash

PARTIAL = ".partial"
JOURNAL = ".partial.journal"
CALIBRATION = ".partial.calibration"
TUNING = ".partial.tuning"
MARKER = ".cluster"
"""Behind the name of the unfinished file: what tells workers of a cluster that they see it."""
_NAME_MAX = 255


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


class Laid(Protocol):
    """A file whose layout is known: payloads begin at `data_offset`, tensors follow each other without holes."""

    @property
    def data_offset(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def tensors(self) -> Sequence[Payload]: ...


@dataclass(frozen=True)
class Destination:
    """Where a file is to stand. `extra_bytes` is what else the work stores on that disk (the shard cache)."""

    path: Path
    force: bool = False
    extra_bytes: int = 0

    def check(self, total_bytes: int) -> None:
        """Refuse an output that exists, has no folder, or does not fit on its disk; OutputError. Touches nothing."""
        with disk_errors(self.path):
            self._check(self.path, self.path.parent, total_bytes)

    def _check(self, path: Path, folder: Path, total_bytes: int) -> None:
        if not folder.is_dir():
            raise OutputError("its folder does not exist", file=path, hint=f"mkdir -p {folder}")
        _check_name(path)
        if path.is_dir():
            raise OutputError("is a folder", file=path, hint="give --output a file name")
        if os.path.lexists(path) and not self.force:
            raise OutputError(
                "exists already", file=path, hint="give --force to replace it, or another --output"
            )
        if path.exists() and not path.is_file():  # a device or a pipe, which a file would take the place of
            raise OutputError("is no plain file", file=path, hint="give --output the name of a file")
        free, needed = free_bytes(folder), total_bytes + self.extra_bytes
        if free is not None and (room := free + held_bytes(path)) < needed:
            raise OutputError(
                f"needs {needed / 1e9:.1f} GB and its disk has {room / 1e9:.1f} GB free",
                file=path,
                hint="free some space, or give an --output on another disk",
            )

    def check_unused(self) -> None:
        """Refuse, before any work, an output that another process is writing; InUseError."""
        journal = beside(self.path, JOURNAL)
        if os.path.lexists(journal):
            Journal(journal).close()


def _check_name(path: Path) -> None:
    """Helper files have longer names than the output; a name that is too long for them is refused before any work."""
    try:
        most = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        most = _NAME_MAX
    most -= max(len(CALIBRATION), len(JOURNAL) + len(OWNER))
    size = len(os.fsencode(path.name))
    if size > most:
        raise OutputError(
            f"its name is too long: it has {size} bytes, and with the names of helper files {most} are possible here",
            file=path,
            hint="give a shorter --output; the finished file may be renamed",
        )


def held_bytes(path: Path) -> int:
    """Bytes of the disk that an unfinished file has already, with the calibration beside it."""
    held = 0
    with suppress(OSError):
        held += beside(path, PARTIAL).lstat().st_blocks * 512
    with suppress(OSError):
        held += sum(file.lstat().st_blocks * 512 for file in beside(path, CALIBRATION).iterdir())
    return held


class PartialFile:
    """An unfinished file with its journal; a context manager that holds the lock on both.

    `begun_anew` says whether there was nothing to continue.
    """

    def __init__(
        self,
        destination: Destination,
        laid: Laid,
        ranges: Sequence[Range],
        signature: Signature,
        restart: bool = False,
    ) -> None:
        """Lock the output; then look at it, and continue the unfinished file there, or begin it (`restart`: anew).

        Raises InUseError where another process has the output, OutputError where it exists, does not fit or cannot be
        written, and ResumeError where the unfinished file has another signature.
        """
        self.final, self.path = destination.path, beside(destination.path, PARTIAL)
        self._laid, self._fd, self._force = laid, -1, destination.force
        self._begun = self._committed = False
        self._is_told_apart = True
        destination.check(laid.total_bytes)
        self.journal = Journal(beside(destination.path, JOURNAL))
        try:
            destination.check(laid.total_bytes)
            anew = restart or not os.path.lexists(self.path)
            self.begun_anew = self.journal.begin(signature, anew)
            self._begun = True
            if self.begun_anew:
                with disk_errors(self.path):
                    self.path.unlink(missing_ok=True)
            self._open(laid.total_bytes)
        except BaseException:
            self.close()
            raise
        self.hash = RunningHash(ranges, laid.tensors, self.read)

    def _open(self, total_bytes: int) -> None:
        self._fd = open_own(self.path)
        with disk_errors(self.path):
            _reserve(self._fd, total_bytes)
            os.ftruncate(self._fd, total_bytes)
        # Some network shares give a name and its open file different inode numbers, so nothing follows from them there.
        self._is_told_apart = is_at(self._fd, self.path)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> Mapping[str, Record]:
        """What is noted of each range that has been written, by key."""
        return self.journal.done

    def take_over(self, order: Sequence[Range], jobs: int, watch: Watch = UNWATCHED) -> frozenset[str]:
        """The keys of ranges of an earlier run whose bytes still have the checksum noted for them.

        They are hashed as if they had been put just now; `jobs` threads read, and `watch` hears of it.
        """

        def holds(each: Range) -> bool:
            data = self.read(each.start, each.nbytes)
            watch.advance(each.nbytes, each.key)
            return bool(xxhash.xxh64_hexdigest(data) == self.done[each.key]["xxh64"])

        known = [each for each in order if each.key in self.done]
        if known:
            watch.begin("checking what stands", sum(each.nbytes for each in known), "bytes")
        with ThreadPoolExecutor(jobs) as pool:
            good = [each.key for each, fine in zip(known, pool.map(holds, known), strict=True) if fine]
        for key in good:
            self.hash.advance(key)
        return frozenset(good)

    def put(self, where: Range, payload: memoryview, record: Mapping[str, Any]) -> None:
        """Write a range's bytes, note them with `record` in the journal, and hash what is complete."""
        if payload.nbytes != where.nbytes:
            raise AssertionError(f"{where.key}: {payload.nbytes} bytes given, {where.nbytes} planned")
        with disk_errors(self.path):
            write_all(self._fd, payload.cast("B"), self._laid.data_offset + where.start)
        self.journal.record(where.key, xxhash.xxh64_hexdigest(payload), **record)
        self.hash.advance(where.key)

    @property
    def data_offset(self) -> int:
        """Where in the file the payloads begin."""
        return self._laid.data_offset

    def write(self, offset: int, payload: bytes) -> None:
        """Write bytes of another process at their place in the file, which notes them later; on any thread."""
        with disk_errors(self.path):
            write_all(self._fd, memoryview(payload), offset)

    def copy(self, where: Range, file: int, offset: int) -> None:
        """Copy a range's bytes from an open file, which holds them from `offset` on; `note` comes next.

        The system copies by itself where it can: on some file systems nothing moves, and shares copy where they are.
        """
        start, left = self.data_offset + where.start, where.nbytes
        with disk_errors(self.path):
            while left:
                done = copy_range(file, self._fd, left, offset, start)
                if not done:
                    return  # the file has become shorter, which `note` finds
                offset, start, left = offset + done, start + done, left - done

    def note(self, where: Range, digest: str, record: Mapping[str, Any]) -> bool:
        """Note a range that another process has written; false where its bytes, read back, have another xxh64."""
        if not self._reads(where, digest):
            # A network share may have kept what it read before they were written.
            self._forget(where)
            if not self._reads(where, digest):
                return False
        self.journal.record(where.key, digest, **record)
        self.hash.advance(where.key)
        return True

    def _reads(self, where: Range, digest: str) -> bool:
        return bool(xxhash.xxh64_hexdigest(self.read(where.start, where.nbytes)) == digest)

    def _forget(self, where: Range) -> None:
        """Have the system drop what it keeps in memory of a range, where it offers that."""
        advise: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)
        if advise is not None:
            with suppress(OSError):
                advise(self._fd, self.data_offset + where.start, where.nbytes, os.POSIX_FADV_DONTNEED)

    def read(self, start: int, nbytes: int) -> bytes:
        """Exactly `nbytes` of the payloads from `start`; the file has its full size from the beginning."""
        parts = []
        offset = self._laid.data_offset + start
        while nbytes:
            with disk_errors(self.path):
                part = os.pread(self._fd, nbytes, offset)
            if not part:
                raise OutputError("has become shorter while it was written", file=self.path)
            parts.append(part)
            offset, nbytes = offset + len(part), nbytes - len(part)
        return b"".join(parts)

    def sync(self) -> None:
        """Wait until everything that was put is on the disk."""
        with disk_errors(self.path):
            sync(self._fd)

    def commit(self, header: bytes | memoryview, after: bytes = b"") -> Path:
        """Write what stands before the payloads, and behind them, give the open file its final name, and make the name
        durable.

        Raises OutputError where that fails; then everything stays as it is, and the next run has only this to do.
        """
        with disk_errors(self.path):
            write_all(self._fd, memoryview(after), self._laid.total_bytes)
            write_all(self._fd, memoryview(header), 0)
        self.sync()
        if self._is_replaced():
            raise OutputError(
                "was removed or replaced by somebody else while it was written",
                file=self.path,
                hint="run the same command again, with --restart",
            )
        if os.path.lexists(self.final) and not self._force:
            raise OutputError(
                "was made by somebody else while this file was written",
                file=self.final,
                hint=f"the finished bytes are in {self.path.name}; --force puts them here and encodes nothing anew",
            )
        try:
            self.path.rename(self.final)
        except OSError as e:
            raise OutputError(
                f"the finished file cannot be given this name: {e.strerror}",
                file=self.final,
                hint=f"its bytes are in {self.path.name}; the same command tries again and encodes nothing anew",
            ) from None
        sync_folder(self.final.parent)
        self._committed = True
        return self.final

    def _is_replaced(self) -> bool:
        """Whether another file, or none, stands under the temporary name by now."""
        return self._is_told_apart and not is_at(self._fd, self.path)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to continue: the file is finished, or nothing of it is noted."""
        return self._begun and (self._committed or not self.journal.done)

    def close(self) -> None:
        """Let go of the file. Where nothing is left to continue, what stands beside the output is removed."""
        try:
            if self._fd >= 0:
                if self.is_over and not self._committed and not self._is_replaced():
                    with suppress(OSError):
                        self.path.unlink()
                os.close(self._fd)
                self._fd = -1
            if self.is_over:
                self.journal.remove()
        finally:
            self.journal.close()


def _reserve(fd: int, total_bytes: int) -> None:
    """Take the file's space from the disk now, where the system offers that; else a full disk shows itself later."""
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if reserve is None or total_bytes == 0:
        return
    try:
        reserve(fd, 0, total_bytes)
    except OSError as e:
        if e.errno not in NOT_OFFERED:
            raise
