"""Opening an imatrix file of either kind."""

from __future__ import annotations

from pathlib import Path

from ...errors import ImatrixError
from ...lfs import HEAD_BYTES, HINT, PROBLEM, is_pointer
from ...unchanged import UnchangedFile
from .dat_file import read_dat
from .entry import Imatrix
from .gguf_file import read_gguf
from .gguf_header import MAGIC


def read_imatrix(path: str | Path) -> Imatrix:
    """Open an imatrix file of either kind; ImatrixError for anything else, for a broken one, and for one that changes.

    The file is hashed now. Its entries are read when they are asked for, and are those of this hash.
    """
    path = Path(path)
    if path.is_dir():
        raise ImatrixError("cannot be read: it is a folder", file=path, hint="check --imatrix")
    file = UnchangedFile(path, ImatrixError)
    head = file.read(lambda f: f.read(HEAD_BYTES))
    if is_pointer(head):
        raise ImatrixError(PROBLEM, file=path, hint=HINT)
    return read_gguf(file) if head.startswith(MAGIC) else read_dat(file)
