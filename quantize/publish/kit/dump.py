"""Dumps of hidden states (HFHS) of a kit's models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ....verify.hidden import HiddenWriter


def write_hidden(path: Path, states: NDArray[np.float32]) -> None:
    """A dump of the states f32 [layers, positions, hidden] after each layer."""
    with HiddenWriter(path, *states.shape) as writer:
        for layer in states:
            writer.add(layer)
