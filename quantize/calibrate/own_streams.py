"""The residual streams of a file that is being tuned: what its own layers put out, kept between layers.

They lie in the folder of the build's calibration, which its holder has locked. The journal of the file knows their
hashes.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import CalibrationError
from ...formats.unchanged import UnchangedFile
from ..write.atomic import write_atomic

F32 = NDArray[np.float32]


def own_file(layer: int) -> str:
    """The file's own stream that enters a layer."""
    return f"own-{layer:05d}.f32"


def save_stream(folder: Path, layer: int, stream: F32) -> str:
    """Make the stream f32 [sequences, length, hidden] that enters a layer durable; returns the file's sha256."""
    data = np.ascontiguousarray(stream, "<f4").data.cast("B")
    return write_atomic(folder / own_file(layer), [data]).sha256


def load_stream(folder: Path, layer: int, shape: tuple[int, ...], sha256: str | None) -> F32 | None:
    """The stream that enters a layer, mapped; None where it is not there as it was saved."""
    path = folder / own_file(layer)
    if sha256 is None or not path.is_file():
        return None
    with suppress(CalibrationError):
        if UnchangedFile(path, CalibrationError).sha256() == sha256:
            return np.memmap(path, "<f4", "r", shape=shape)
    return None
