"""Dumps of hidden states (HFHS) of a kit's models, which have one layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ....verify.hidden import HiddenWriter


def write_hidden(path: Path, states: NDArray[np.float32]) -> None:
    """A dump of the states f32 [positions, hidden] after a single layer."""
    with HiddenWriter(path, 1, *states.shape) as writer:
        writer.add(states)
