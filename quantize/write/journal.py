"""The journal of an unfinished build: what has been written, with a checksum of its bytes, one line per unit.

Append-only and synced line by line, so that after any crash a prefix of whole lines is left; each line carries a
checksum of itself, and reading stops at the first one that does not hold. The first line is the job's signature.
Depends on errors, output and xxhash.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ...formats.errors import OutputError, ResumeError
from .partial_file import disk_errors

Job = Mapping[str, Any]
Record = dict[str, Any]


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%s %s\n" % (xxhash.xxh64_hexdigest(text).encode(), text)


def _parse(line: bytes) -> Record | None:
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or xxhash.xxh64_hexdigest(text).encode() != digest:
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None


def read_journal(path: Path) -> tuple[list[Record], int]:
    """The records of the whole lines at the start of a journal, and the bytes that they take."""
    records: list[Record] = []
    size = 0
    with path.open("rb") as f:
        for line in f:
            record = _parse(line)
            if record is None:
                break
            records.append(record)
            size += len(line)
    return records, size


def differences(there: Job, here: Job) -> list[str]:
    """One sentence per key in which two signatures differ."""
    return [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]


class Journal:
    """An open journal, locked against a second build of the same output; `done` maps unit keys to records."""

    def __init__(self, path: Path, job: Job) -> None:
        """Open or begin the journal of `job`.

        Raises ResumeError where the file there belongs to another job (the keys that differ are named), OutputError
        where another process is writing it.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.done = self._begin(job)
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self, job: Job) -> dict[str, Record]:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError("another build is writing this output right now", file=self.path) from None
        records, size = read_journal(self.path)
        os.ftruncate(self._fd, size)
        if not records:
            self._append({"job": dict(job)})
            return {}
        other = differences(records[0].get("job", {}), json.loads(json.dumps(dict(job))))
        if other:
            raise ResumeError(
                f"the unfinished build is of a different job: {'; '.join(other)}",
                file=self.path,
                hint="give the same arguments to continue it, or --restart to discard it",
            )
        return {str(record["unit"]): record for record in records[1:]}

    def _append(self, record: Mapping[str, Any]) -> None:
        with disk_errors(self.path):
            os.write(self._fd, _line(record))
            os.fsync(self._fd)

    def record(self, unit: str, digest: str, **extra: Any) -> None:
        """Note that a unit's bytes, with this checksum, stand in the file."""
        record = {"unit": unit, "xxh64": digest, **extra}
        self._append(record)
        self.done[unit] = record

    def close(self) -> None:
        os.close(self._fd)
