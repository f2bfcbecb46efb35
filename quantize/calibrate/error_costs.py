"""What errors behind each layer cost, and how rows of down answer each other for it, from files of sensitivities."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...awq.row_answers import RowAnswers, cost_factor, row_answers
from ...formats.minimax import ModelConfig
from .sensitivity_files import read_sensitivity

FACTORS = 4
"""Layers whose factor is kept: of those that are here, and of one that is tuned after it was rounded."""


class ErrorCosts:
    """The costs of a model's layers, for any number of threads; nothing is known of them before `found`."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._files: tuple[Path, Mapping[int, str]] | None = None
        self._factor = lru_cache(FACTORS)(self._read)

    def found(self, folder: Path, hashes: Mapping[int, str]) -> None:
        """The files of these layers lie in a folder, and have these hashes."""
        self._files = folder, hashes

    def factor(self, layer: int) -> NDArray[np.float32] | None:
        """The `cost_factor` f32 [hidden, hidden] of a layer, None where it is not known; CalibrationError where its
        file is gone or is not what it was.
        """
        factor = self._factor(layer)
        return None if factor is None else np.ascontiguousarray(factor, np.float32)

    def row_answers(self, layer: int) -> RowAnswers | None:
        """How rows of the layer's down answer each other, where that is known; raises as `factor`."""
        return row_answers(self._factor(layer))

    def _read(self, layer: int) -> NDArray[np.float64] | None:
        if self._files is None:
            return None
        folder, hashes = self._files
        return cost_factor(read_sensitivity(folder, layer, self._config, hashes[layer]))
