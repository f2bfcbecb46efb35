"""The three standard streams of a process, made safe before a command begins.

A stream may be closed, its encoding may lack a character, and whoever reads it may have left. None of this may end a
build, and a file that is opened later may not get the number of a closed stream: libraries that write to it would write
into that file.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

READER_GONE = 141
"""The exit code that shells give to a program whose reader has left (128 + SIGPIPE)."""
_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


def prepare() -> None:
    r"""Open closed streams on the null device, and let every stream show what its encoding lacks as `\xe4`."""
    for number, name, mode in _STREAMS:
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number, and all lower ones are taken
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def silence(stream: TextIO) -> None:
    """Send what is still in a stream's buffer, and all that follows, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    except (OSError, ValueError):  # a stream of a test or of a notebook has no number
        pass
    finally:
        os.close(null)
