"""Files that are replaced as a whole: nothing half-written ever stands under the final name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...formats.own_file import disk_errors, is_stream, open_stream, sync, write_all


@dataclass(frozen=True)
class Written:
    """The size and the sha256 (64 hexadecimal digits) of a file as it was written."""

    bytes: int
    sha256: str


def write_atomic(path: Path, pieces: Iterable[memoryview]) -> Written:
    """Write a file under the temporary name .NAME.partial, sync it and give it its name. Each piece is hashed while it
    is written, and is valid until the next one is asked for.

    A file that stands under the temporary name is removed first; only the holder of the folder's lock may write there.
    Raises OutputError where the disk is full or cannot be written; the temporary file is removed then.
    """
    partial, digest, size = path.with_name(f".{path.name}.partial"), hashlib.sha256(), 0
    with disk_errors(path):
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="hash") as beside:
                for piece in pieces:
                    data = piece.cast("B")
                    hashed = beside.submit(digest.update, data)
                    write_all(fd, data)
                    hashed.result()
                    size += data.nbytes
            sync(fd)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        finally:
            os.close(fd)
    return Written(size, digest.hexdigest())


def write_result(path: Path, pieces: Iterable[memoryview]) -> None:
    """Write a result that is complete: a file as `write_atomic` does, or the bytes into a pipe, a terminal or
    /dev/stdout, which `check_place` has let through. OutputError where that fails.
    """
    if not is_stream(path):
        write_atomic(path, pieces)
        return
    with disk_errors(path), open_stream(path) as stream:
        for piece in pieces:
            stream.write(piece)
