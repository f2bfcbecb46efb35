"""The two residual streams between layers, kept on the disk while a file is tuned: the source's and the file's own.

After a layer both are written, then the journal of the output names their hashes, then those before the layer go. So
a run that was killed continues before the first layer that the journal does not hold.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import OutputError, ResumeError
from ...formats.own_file import disk_errors
from ...formats.unchanged import UnchangedFile
from ..write.atomic import write_atomic

F32 = NDArray[np.float32]
KINDS = ("source", "own")
_OURS = re.compile(r"\.?(source|own)-\d+\.f32(\.partial)?")


@dataclass(frozen=True)
class Streams:
    """What enters a layer, f32 [sequences, length, hidden] each: of the source, and of the file as it is stored."""

    source: F32
    own: F32


class StreamFolder:
    """The folder that keeps them, beside the output; whoever holds the output's lock has it alone."""

    def __init__(self, path: Path, anew: bool) -> None:
        """Take over the folder, or make it; `anew` drops what an earlier run left. OutputError where something else
        has its name.
        """
        self.path = path
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OutputError("is in the way of the streams between layers", file=path, hint="remove it")
        if anew and path.exists():
            self.discard()
        with disk_errors(path):
            path.mkdir(exist_ok=True)

    def _file(self, kind: str, layer: int) -> Path:
        return self.path / f"{kind}-{layer:05d}.f32"

    def save(self, layer: int, streams: Streams) -> dict[str, str]:
        """Make what enters a layer durable; returns the SHA-256 of both."""
        return {
            kind: write_atomic(
                self._file(kind, layer), [np.ascontiguousarray(getattr(streams, kind), "<f4").data.cast("B")]
            ).sha256
            for kind in KINDS
        }

    def load(self, layer: int, shape: tuple[int, ...], expected: Mapping[str, Any]) -> Streams:
        """What enters a layer, as it was saved with these hashes; ResumeError where a file is gone or damaged."""
        found = {}
        for kind in KINDS:
            path = self._file(kind, layer)
            if not path.is_file() or UnchangedFile(path, ResumeError).sha256() != expected.get(kind):
                raise ResumeError(
                    "is not as the earlier run left it",
                    file=path,
                    hint="give --restart to tune the file from its first layer",
                )
            found[kind] = np.fromfile(path, "<f4").reshape(shape).astype(np.float32, copy=False)
        return Streams(**found)

    def drop(self, layer: int) -> None:
        """Remove what enters a layer."""
        for kind in KINDS:
            with disk_errors(self.path):
                self._file(kind, layer).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder and what is ours in it; anything else stays."""
        with disk_errors(self.path):
            for file in self.path.iterdir():
                if _OURS.fullmatch(file.name):
                    file.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()
