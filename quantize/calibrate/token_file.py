"""Files of token ids: an array in .npy, or a text with one sequence of ids on each line.

Nothing that a file states is believed before it is checked: an array of objects is never loaded, since loading one runs
code, and a header's shape is held against the file's size before memory is taken.
"""

from __future__ import annotations

import math
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ...formats.errors import TokenError
from ...formats.lfs import HINT, PROBLEM, is_pointer
from ...formats.text import shown

TOKEN_LIMIT = 1 << 28
"""Token ids that a file may give: more than any machine runs through a model of this size."""
TEXT_LIMIT = 64 << 20
"""Bytes of a text of ids."""
PIECE = 16 << 20
MAGIC = b"\x93NUMPY"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_EXPECTED = (
    "token ids are whole numbers [sequences, length], in a .npy file or as text with a sequence on each line"
)
_NO_ID = re.compile(rb"[^0-9\s]|[0-9]{19}")

Ids = NDArray[Any]


def read_token_file(path: Path, sequences: int | None = None) -> Ids:
    """Token ids of any integer type, [sequences, length] or, of a .npy file with one dimension, [length].

    With `sequences` only so many are read, where the file has more. Raises TokenError for everything else.
    """
    try:
        with path.open("rb") as f:
            head = f.peek(len(MAGIC) + 64)
            if head.startswith(MAGIC):
                return _read_array(f, path, sequences)
            if is_pointer(head):
                raise TokenError(PROBLEM, file=path, hint=HINT)
            return _read_text(f, path)
    except OSError as e:
        raise TokenError(f"cannot be read: {e.strerror}", file=path) from None


def _refusal(problem: str, path: Path) -> TokenError:
    return TokenError(f"does not hold token ids: {problem}", file=path, hint=_EXPECTED)


def _read_array(f: BufferedReader, path: Path, sequences: int | None) -> Ids:
    try:
        version = npy.read_magic(f)
        if version not in _HEADERS:
            raise ValueError(f"its .npy version is {version[0]}.{version[1]}")
        shape, by_columns, dtype = _HEADERS[version](f)
    except Exception as e:  # numpy reads it as Python text and lets out whatever that raises
        raise _refusal(f"its .npy header is broken: {shown(str(e), 120)}", path) from None
    if dtype.hasobject:
        raise _refusal("its array holds Python objects, which cannot be read without running code", path)
    if dtype.kind not in "iu" or dtype.subdtype:
        raise _refusal(f"it holds {shown(str(dtype))}, not whole numbers", path)
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise _refusal(f"its array has the shape {list(shape)}, not one of sequences with a length", path)
    if sequences is not None and len(shape) == 2 and not by_columns:
        shape = (min(shape[0], sequences), shape[1])
    count = math.prod(shape)
    if count > TOKEN_LIMIT:
        raise TokenError(f"states {count} tokens, more than {TOKEN_LIMIT}", file=path)
    data = _take(f, count * dtype.itemsize, path)
    ids = np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")
    return ids if sequences is None or ids.ndim == 1 else ids[:sequences]


def _take(f: BufferedReader, count: int, path: Path) -> bytearray:
    """The next `count` bytes, taken in pieces so that no memory is taken for bytes that do not come."""
    status = os.fstat(f.fileno())
    missing = f"its array takes {count} bytes, and the file ends before that"
    if stat.S_ISREG(status.st_mode) and status.st_size - f.tell() < count:
        raise _refusal(missing, path)
    data = bytearray()
    while len(data) < count:
        piece = f.read(min(PIECE, count - len(data)))
        if not piece:
            raise _refusal(missing, path)
        data += piece
    return data


def _read_text(f: BufferedReader, path: Path) -> Ids:
    raw = f.read(TEXT_LIMIT + 1)
    if len(raw) > TEXT_LIMIT:
        raise TokenError(
            f"is a text of more than {TEXT_LIMIT} bytes", file=path, hint="save the ids as a .npy file"
        )
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    wrong = _NO_ID.search(raw)
    if wrong is not None:
        line, word = (
            raw.count(b"\n", 0, wrong.start()) + 1,
            raw[wrong.start() : wrong.start() + 20].split()[0],
        )
        raise _refusal(f"line {line} holds {shown(word.decode('utf-8', 'replace'))}", path)
    lengths = _line_lengths(raw)
    if not lengths.size:
        raise _refusal("it is empty", path)
    if (lengths != lengths[0]).any():
        raise _refusal(f"its lines have from {lengths.min()} to {lengths.max()} ids, not equally many", path)
    return np.fromstring(raw.decode("ascii"), np.int64, sep=" ").reshape(len(lengths), -1)


def _line_lengths(raw: bytes) -> NDArray[np.int64]:
    """How many numbers stand on each line of digits and white space; lines without any are left out."""
    characters = np.frombuffer(raw, np.uint8)
    digit = characters >= ord("0")
    begins = np.flatnonzero(digit & ~np.concatenate(([False], digit))[:-1])
    counts = np.bincount(np.searchsorted(np.flatnonzero(characters == ord("\n")), begins))
    return counts[counts > 0]
