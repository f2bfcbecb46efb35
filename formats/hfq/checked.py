"""Payloads held against the checksums that their file states, where they are read anyway.

A bit that turned on a disk or a cable leaves a file well formed: only its checksum tells. Files of other programs state
none, and are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import HfqError, HfqKind
from .container import CHUNK, HfqFile
from .layout import TensorEntry
from .provenance import Provenance


class CheckedFile(HfqFile):
    """An open HFQ file, of which every payload is held against its checksum when some of it is first read; HfqError."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._left = dict(stated_checksums(self))

    def read_range(self, entry: TensorEntry, start: int, stop: int) -> NDArray[np.uint8]:
        data = super().read_range(entry, start, stop)
        stated = self._left.get(entry.name)
        if stated is not None:
            whole = [data] if data.nbytes == entry.nbytes else self._pieces(entry)
            hold(self, entry, checksum(whole), stated)
            self._left.pop(entry.name, None)
        return data

    def _pieces(self, entry: TensorEntry) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, entry.nbytes, CHUNK):
            yield super().read_range(entry, start, min(start + CHUNK, entry.nbytes))


class PayloadCheck:
    """Takes all bytes of a file in order, and holds each payload against its checksum as soon as it has ended."""

    def __init__(self, file: HfqFile) -> None:
        stated = stated_checksums(file)
        self._file, self._stated = file, stated
        self._left = [entry for entry in reversed(file.entries) if entry.name in stated]
        self._at, self._digest = 0, xxhash.xxh64()

    def __call__(self, data: bytes) -> None:
        """The next bytes of the file; HfqError where they end a payload that is damaged."""
        view, start = memoryview(data), self._at
        self._at += view.nbytes
        while self._left and self._left[-1].offset < self._at:
            entry = self._left[-1]
            end = entry.offset + entry.nbytes
            self._digest.update(view[max(entry.offset - start, 0) : end - start])
            if end > self._at:
                return
            hold(self._file, entry, self._digest.hexdigest(), self._stated[entry.name])
            self._left.pop()
            self._digest.reset()


def payload_checks(path: Path) -> Callable[[], PayloadCheck]:
    """What makes a `PayloadCheck` of a file, for `UnchangedFile.sha256`; HfqError where it is none."""
    with HfqFile(path) as file:
        return partial(PayloadCheck, file)


def stated_checksums(file: HfqFile) -> Mapping[str, str]:
    """The XXH64 of each payload by its tensor's name; empty where the file does not state one for each."""
    stated = Provenance.of(file).checksums
    if len(stated) != len(file.entries):
        return {}
    return {entry.name: checksum for entry, checksum in zip(file.entries, stated, strict=True)}


def checksum(pieces: Iterable[NDArray[np.uint8]]) -> str:
    """The checksum of a payload."""
    digest = xxhash.xxh64()
    for piece in pieces:
        digest.update(piece.data)
    return digest.hexdigest()


def hold(file: HfqFile, entry: TensorEntry, found: str, stated: str) -> None:
    """HfqError where the checksum of a payload is not the stated one."""
    if found != stated:
        raise HfqError(
            f"its bytes are not those that were written (checksum {found}, and the file states {stated})",
            kind=HfqKind.CHECKSUM,
            file=file.path,
            tensor=entry.name,
            hint="the file is damaged: fetch or build it again; mq-quant verify lists every damaged tensor",
        )
