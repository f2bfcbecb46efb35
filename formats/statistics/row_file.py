"""The file of what one layer's experts saw: the inputs of gate and up, a row for each token, and who took it.

A build that calibrates itself keeps one such safetensors file, of the layer that it is encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..minimax import ModelConfig
from .moment_file import LayerFile, open_tensors

NOBODY = -1
"""Stands in place of an expert where a token's inputs are not finite."""


def row_file(layer: int) -> str:
    return f"rows-{layer:05d}.safetensors"


def row_tensors(config: ModelConfig, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of one layer's file: `inputs`, and in `experts` the experts that each token takes."""
    return {
        "inputs": ("F32", (tokens, config.hidden_size)),
        "experts": ("I64", (tokens, config.num_experts_per_tok)),
    }


@dataclass(frozen=True)
class ExpertRows:
    """An open file of rows, of which any number of threads may read. `order` i64 holds the tokens sorted by expert,
    those of expert e from starts[e] to starts[e + 1], ascending.
    """

    file: LayerFile
    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def tokens(self, expert: int) -> NDArray[np.int64]:
        """The tokens i64 [n] that an expert saw, ascending."""
        return self.order[self.starts[expert] : self.starts[expert + 1]]

    def of(self, expert: int) -> NDArray[np.float32]:
        """The inputs f32 [n, hidden] that an expert saw; CalibrationError where the file has changed."""
        return np.asarray(self.file.rows("inputs", self.tokens(expert)), np.float32)


def open_rows(path: Path, config: ModelConfig, tokens: int) -> ExpertRows:
    """The rows of one layer; CalibrationError where the file is not one of so many tokens of this model."""
    file = open_tensors(path, row_tensors(config, tokens))
    experts = file.array("experts").reshape(-1)
    by_expert = np.argsort(experts, kind="stable")
    starts = np.searchsorted(experts[by_expert], np.arange(config.num_local_experts + 1))
    return ExpertRows(file, by_expert // config.num_experts_per_tok, starts)
