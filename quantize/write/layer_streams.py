"""Streams that pass the layers of a model together. Their folder, beside an output, has a journal with a line for each
layer that all of them have passed, so that the same command continues behind the last of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.own_file import disk_errors
from .journal import Journal, Record, Signature
from .stream_folder import StreamFolder

F32 = NDArray[np.float32]
JOURNAL = "journal"


@dataclass(frozen=True)
class LayerStreams:
    """Streams f32 of one shape, each under its name in the folder."""

    journal: Journal
    folder: StreamFolder
    shape: tuple[int, ...]

    @property
    def done(self) -> int:
        """Layers that all streams have passed."""
        return len(self.journal.done)

    def record(self, layer: int) -> Record:
        """What was noted of a layer that all streams have passed."""
        return self.journal.done[f"layer.{layer}"]

    def hashes(self, layer: int) -> Mapping[str, str]:
        """The SHA-256 of each stream that enters a layer, by its name; none are kept before the first."""
        found: Mapping[str, str] = self.record(layer - 1)["streams"] if layer else {}
        return found

    def load(self, name: str, layer: int) -> F32:
        """The stream that enters a layer; ResumeError where it is gone or damaged."""
        return self.folder.load(name, layer, self.shape, self.hashes(layer)[name])

    def mapped(self, name: str, layer: int) -> F32:
        """The same, of which only what is used comes into memory."""
        return self.folder.mapped(name, layer, self.shape, self.hashes(layer)[name])

    def end_layer(self, layer: int, hashes: Mapping[str, str], **besides: Any) -> None:
        """Note that all streams have passed a layer, behind which these were saved; those before it go."""
        self.journal.record(f"layer.{layer}", "", streams=dict(hashes), **besides)
        for name in hashes:
            self.folder.drop(name, layer)

    def finish(self) -> None:
        """Say that nothing is left to continue."""
        self.journal.done.clear()


@contextmanager
def layer_streams(
    path: Path, shape: tuple[int, ...], work: str, signature: Signature, restart: bool, hint: str
) -> Iterator[LayerStreams]:
    """The locked folder with its streams, as an earlier run of this signature left them; it goes where nothing is left
    to continue.

    `work` is what the journal's errors call it, `hint` what to do where a stream is damaged. Raises InUseError where
    another process has the folder, OutputError where something else has its name, ResumeError where an unfinished run
    there is of another signature, unless it is to `restart`.
    """
    with disk_errors(path):
        path.mkdir(exist_ok=True)
    journal = Journal(path / JOURNAL, work)
    try:
        folder = StreamFolder(path, journal.begin(signature, restart), hint)
        try:
            yield LayerStreams(journal, folder, shape)
        finally:
            if not journal.done:
                journal.remove()
                folder.discard()
    finally:
        journal.close()
