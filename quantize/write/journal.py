"""The journal of unfinished work: what has been written, with a checksum of its bytes, one line per unit.

Append-only and synced line by line, so that after any crash a prefix of whole lines is left; each line carries a
checksum of itself, and reading stops at the first line that does not hold. The first line is the signature: everything
that decides the bytes of the result. The journal is also the lock of the work: who has it open has the output alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from ...formats.errors import ResumeError
from ...formats.file_lock import FileLock
from ...formats.own_file import disk_errors, sync, write_all

Signature = Mapping[str, Any]
Record = dict[str, Any]

BUILD, CALIBRATION, EVALUATION, MEASUREMENT = "build", "calibration", "evaluation", "measurement"
"""Whose journal it is, in the words of its errors."""
_BUSY = {
    BUILD: "another build is writing this output right now",
    CALIBRATION: "another calibration is writing this folder right now",
    EVALUATION: "another evaluation is writing this output right now",
    MEASUREMENT: "another measurement is writing this output right now",
}
SHOWN = 8
"""Differences that a message names."""
VALUE = 64
"""Characters of a value that a message shows."""
_FIRST = (
    "recipe.tier",
    "recipe.fit",
    "recipe.gain",
    "recipe.awq",
    "recipe.model",
    "source",
    "imatrix",
    "calibration",
)
_LAST = ("recipe.rules", "recipe.description", "recipe", "config", "plan", "code")
"""What a person gave comes first, and what only follows from it comes last."""


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%s %s\n" % (xxhash.xxh64_hexdigest(text).encode(), text)


def _parse(line: bytes) -> Record | None:
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or xxhash.xxh64_hexdigest(text).encode() != digest:
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None


def _is_whole(record: Record, first: bool) -> bool:
    """Whether a record is one of ours: the signature in the first line, a unit in the others."""
    if first:
        return isinstance(record.get("job"), dict)
    return isinstance(record.get("unit"), str) and isinstance(record.get("xxh64"), str)


def whole_lines(lines: Iterable[bytes]) -> tuple[list[Record], int]:
    """The records of the whole lines at the start of a journal, and the bytes that they take."""
    records: list[Record] = []
    size = 0
    for line in lines:
        record = _parse(line)
        if record is None or not _is_whole(record, not records):
            break
        records.append(record)
        size += len(line)
    return records, size


def read_journal(path: Path) -> tuple[list[Record], int]:
    """`whole_lines` of a journal's file, which is not locked for it."""
    with path.open("rb") as f:
        return whole_lines(f)


def differences(there: Signature, here: Signature) -> list[str]:
    """One short line per key in which two signatures differ, what a person gave first."""
    keys = [key for key in {*there, *here} if there.get(key) != here.get(key)]
    return [_difference(key, there.get(key), here.get(key)) for key in sorted(keys, key=_rank)]


def _rank(key: str) -> tuple[int, str]:
    for rank, prefixes in ((0, _FIRST), (2, _LAST)):
        for i, prefix in enumerate(prefixes):
            if key == prefix or key.startswith(prefix + "."):
                return 100 * rank + i, key
    return 100, key


def _difference(key: str, there: Any, here: Any) -> str:
    before, now = _short(there), _short(here)
    return f"{key} differs" if before == now else f"{key} is {before} there and {now} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= VALUE + 2 else f"{text[:VALUE]}…"


class Journal:
    """An open journal, locked against a second process; `begin` comes first, then `done` maps keys to records."""

    def __init__(self, path: Path, work: str = BUILD) -> None:
        """Open or make the journal and lock it; nothing of it is changed yet.

        Raises InUseError where another process is at work, OutputError where the file is not a plain one of ours.
        """
        self.path, self._work = path, work
        self._lock = FileLock(path, _BUSY[work])
        self.done: dict[str, Record] = {}

    def begin(self, signature: Signature, anew: bool = False) -> bool:
        """Take over what the journal holds, or begin it (`anew`: whatever it holds); returns whether it was begun.

        Raises ResumeError where units are noted there under another signature; the keys that differ are named.
        """
        fd = self._lock.fd
        with os.fdopen(os.dup(fd), "rb") as f:
            f.seek(0)
            records, size = whole_lines(f)
        mine = json.loads(json.dumps(dict(signature)))
        there = records[0]["job"] if records else {}
        # With no unit noted nothing is lost.
        if anew or len(records) < 2:
            records, size = [], 0
        elif there != mine:
            self._refuse(differences(there, mine))
        with disk_errors(self.path):
            os.ftruncate(fd, size)
            os.lseek(fd, 0, os.SEEK_END)
        if not records:
            self._append({"job": mine})
        self.done = {record["unit"]: record for record in records[1:]}
        return not records

    def _refuse(self, different: list[str]) -> None:
        lines = different[:SHOWN]
        if len(different) > SHOWN:
            lines.append(f"and {len(different) - SHOWN} more")
        raise ResumeError(
            f"the unfinished {self._work} was begun with other arguments or inputs:"
            + "".join(f"\n    {line}" for line in lines),
            file=self.path,
            hint="give the same arguments to continue it, or --restart to discard it",
        )

    def _append(self, record: Mapping[str, Any]) -> None:
        with disk_errors(self.path):
            write_all(self._lock.fd, memoryview(_line(record)))
            sync(self._lock.fd)

    def record(self, unit: str, digest: str, **extra: Any) -> None:
        """Note that a unit's bytes, with this checksum, stand in the file."""
        record = {"unit": unit, "xxh64": digest, **extra}
        self._append(record)
        self.done[unit] = record

    def remove(self) -> None:
        """Remove the file, which stays locked until `close`."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the lock. A journal that was never begun is removed: it was made for the lock alone."""
        with suppress(OSError):
            if self._lock.fd >= 0 and os.fstat(self._lock.fd).st_size == 0:
                self.path.unlink()
        self._lock.close()
