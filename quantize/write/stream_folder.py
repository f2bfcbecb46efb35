"""Residual streams between layers, kept on the disk while a model is run through its layers for hours.

Behind a layer every stream is written, then a journal names their hashes, then those before the layer go. So a run that
was killed continues before the first layer that its journal does not hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import OutputError, ResumeError
from ...formats.own_file import disk_errors
from ...formats.unchanged import UnchangedFile
from .atomic import write_atomic

F32 = NDArray[np.float32]
_BLOCK = 4 << 20
_OURS = re.compile(r"\.?[a-z]+\d*-\d{5}\.f32(\.partial)?")


class StreamFolder:
    """The folder that keeps them, beside the output; whoever holds the output's lock has it alone.

    A stream is known by its name, of small letters and perhaps a number, and the layer that it enters.
    """

    def __init__(self, path: Path, anew: bool, hint: str) -> None:
        """Take over the folder, or make it; `anew` drops what an earlier run left.

        Raises OutputError where something else has its name. `hint` is what to do where a stream is damaged.
        """
        self.path, self._hint = path, hint
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OutputError("is in the way of the streams between layers", file=path, hint="remove it")
        with disk_errors(path):
            path.mkdir(exist_ok=True)
        if anew:
            self.clear()

    def _file(self, name: str, layer: int) -> Path:
        return self.path / f"{name}-{layer:05d}.f32"

    def save(self, name: str, layer: int, stream: F32) -> str:
        """Make a stream that enters a layer durable; returns its SHA-256."""
        return self.save_pieces(name, layer, [np.ascontiguousarray(stream, "<f4").data])

    def save_pieces(self, name: str, layer: int, pieces: Iterable[memoryview]) -> str:
        """The same of its bytes, little-endian; a piece need be valid only until the next one is asked for."""
        return write_atomic(self._file(name, layer), pieces).sha256

    def load(self, name: str, layer: int, shape: tuple[int, ...], sha256: object) -> F32:
        """The stream that enters a layer, as it was saved with this hash; ResumeError where it is gone or damaged."""
        return read_stream(self._file(name, layer), shape, sha256, self._hint)

    def mapped(self, name: str, layer: int, shape: tuple[int, ...], sha256: object) -> F32:
        """The same, of which only what is used comes into memory."""
        path = self._file(name, layer)
        if not path.is_file() or UnchangedFile(path, ResumeError).sha256() != sha256:
            raise _damaged(path, self._hint)
        return np.memmap(path, "<f4", "r", shape=shape)

    def drop(self, name: str, layer: int) -> None:
        """Remove what enters a layer."""
        with disk_errors(self.path):
            self._file(name, layer).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every stream; anything else stays."""
        with disk_errors(self.path):
            for file in self.path.iterdir():
                if _OURS.fullmatch(file.name):
                    file.unlink()

    def discard(self) -> None:
        """Remove the streams and, where it is empty then, the folder."""
        self.clear()
        with contextlib.suppress(OSError):
            self.path.rmdir()


def read_stream(path: Path, shape: tuple[int, ...], sha256: object, hint: str) -> F32:
    """The stream of a file that was saved with this hash; ResumeError with this hint where it is gone or damaged."""
    out = np.empty(shape, "<f4")
    fill = partial(_filled, out.reshape(-1).data.cast("B"))
    if not path.is_file() or UnchangedFile(path, ResumeError).read(fill) != sha256:
        raise _damaged(path, hint)
    return out.astype(np.float32, copy=False)


def _damaged(path: Path, hint: str) -> ResumeError:
    return ResumeError("is not as the earlier run left it", file=path, hint=hint)


def _filled(out: memoryview, file: BufferedReader) -> str | None:
    """Fill memory with a file of its size, hashed meanwhile; the SHA-256, or None where the size is another."""
    digest, at = hashlib.sha256(), 0
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as beside:
        while count := file.readinto(out[at : at + _BLOCK]):
            beside.submit(digest.update, out[at : at + count])
            at += count
    return digest.hexdigest() if at == len(out) and not file.read(1) else None
