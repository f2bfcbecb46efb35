"""Imatrices in llama.cpp's legacy .dat: name, calls and values of each entry, then an optional tail."""

from __future__ import annotations

import os
import struct
from io import BufferedReader

import numpy as np

from ...errors import ImatrixError
from ...unchanged import UnchangedFile
from .entry import Entries, Imatrix, ImatrixEntry, Loader, add_entry, mean_entry

ENTRY_LIMIT = 1 << 16
NAME_LIMIT = 1 << 12
NUMBER_LIMIT = (1 << 31) - 1


def read_dat(file: UnchangedFile) -> Imatrix:
    """The imatrix in a legacy file; ImatrixError where the file is broken or is none."""
    found = file.read(lambda f: _walk(f, file))
    return Imatrix(file.path, "dat", found[1], found[2], file.sha256(), Entries(found[0]))


def _walk(f: BufferedReader, file: UnchangedFile) -> tuple[dict[str, Loader], tuple[str, ...], int]:
    """(entries, names of the datasets, chunks): the whole file's structure, no value being read."""
    loaders: dict[str, Loader] = {}
    for _ in range(_number(f, file, 1, ENTRY_LIMIT, "entries")):
        name = _name(f, file)
        calls = _number(f, file, 0, NUMBER_LIMIT, f"calls of {name}")
        values = _number(f, file, 1, (file.size - f.tell()) // 4, f"values of {name}")
        add_entry(loaders, name, _loader(file, f.tell(), values, calls), file.path)
        f.seek(4 * values, os.SEEK_CUR)
    datasets: tuple[str, ...] = ()
    chunk_count = 0
    if f.tell() < file.size:
        chunk_count = _number(f, file, 0, NUMBER_LIMIT, "chunks")
        if f.tell() < file.size:
            datasets = (_name(f, file),)
    if f.tell() != file.size:
        raise ImatrixError(f"{file.size - f.tell()} bytes follow the last entry", file=file.path)
    return loaders, datasets, chunk_count


def _loader(file: UnchangedFile, start: int, values: int, calls: int) -> Loader:
    def read(f: BufferedReader) -> bytes:
        f.seek(start)
        return f.read(4 * values)

    def load() -> ImatrixEntry:
        stored = np.frombuffer(file.read(read), "<f4")
        return mean_entry(stored[None], np.array([calls], np.float64), False)

    return load


def _number(f: BufferedReader, file: UnchangedFile, low: int, high: int, what: str) -> int:
    raw = f.read(4)
    value = struct.unpack("<i", raw)[0] if len(raw) == 4 else None
    if value is None or not low <= value <= high:
        found = "the end of the file" if value is None else value
        raise ImatrixError(
            f"is no imatrix, or a broken one: {found} where the number of {what} should be",
            file=file.path,
            hint="an imatrix is a GGUF file of type imatrix or llama.cpp's legacy .dat",
        )
    return int(value)


def _name(f: BufferedReader, file: UnchangedFile) -> str:
    length = _number(f, file, 0, NAME_LIMIT, "bytes in a name")
    raw = f.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if len(raw) != length or not text.isprintable():
        raise ImatrixError(f"is no imatrix, or a broken one: {raw[:32]!r} is no name", file=file.path)
    return text
