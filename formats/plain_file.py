"""Opening files that somebody named: what stands there may be anything."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_FAULTS = {
    errno.EIO: "the disk reports a fault: check it and its cable, and copy the file from another disk",
    errno.ESTALE: "the network share has lost the file: see that it is mounted, then run the command again",
    errno.EACCES: "check the permissions of it and of the folders above it",
}


def hint_of(fault: OSError, otherwise: str | None = None) -> str | None:
    """What to do about a file that cannot be read; `otherwise` where the system's word says no more."""
    return _FAULTS.get(fault.errno or 0, otherwise)


def open_plain(path: Path) -> BufferedReader:
    """A plain file, open for reading; OSError for everything else.

    A pipe or a device is not waited for: opening a pipe may take for ever, and a device need have no end.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    except BaseException:
        os.close(fd)
        raise
    return os.fdopen(fd, "rb")
