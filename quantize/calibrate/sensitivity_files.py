"""What errors behind each layer cost, as it lies in a folder: one file for each layer, written by `sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...awq.row_answers import Sensitivity
from ...formats.errors import CalibrationError
from ...formats.minimax import ModelConfig
from ...formats.statistics.moment_file import encode_layer, open_tensors, triangle
from ...formats.statistics.triangles import unpack_moment
from ...formats.unchanged import UnchangedFile
from ..spec.calibration_sizes import SENSITIVITY_TOKENS
from ..write.atomic import write_atomic
from .tokens import Tokens

_NAME = "sensitivity"


def sensitivity_file(layer: int) -> str:
    """The sensitivity of the stream behind a layer."""
    return f"sensitivity-{layer:05d}.safetensors"


def first_tokens(tokens: Tokens) -> Tokens:
    """The sequences that sensitivities come from: the first ones, SENSITIVITY_TOKENS tokens or a little more."""
    return tokens[: -(-SENSITIVITY_TOKENS // tokens.shape[1])]


def sensitivity_record(tokens: Tokens) -> dict[str, Any]:
    """What a manifest says of it."""
    return {"sensitivity": {"tokens": int(first_tokens(tokens).size)}}


def write_sensitivity(folder: Path, layer: int, moment: NDArray[np.float32], tokens: int) -> str:
    """Make the sensitivity behind a layer durable, a moment f32 as `pack_moment` packs it, over so many tokens; returns
    the SHA-256 of its file.
    """
    arrays = {_NAME: moment, "tokens": np.array([tokens])}
    return write_atomic(folder / sensitivity_file(layer), encode_layer(arrays)).sha256


def read_sensitivity(folder: Path, layer: int, config: ModelConfig, sha256: object) -> Sensitivity:
    """The sensitivity behind a layer, as it was written with this hash; CalibrationError."""
    shape = {_NAME: ("F32", (triangle(config.hidden_size),)), "tokens": ("I64", (1,))}
    file = open_tensors(folder / sensitivity_file(layer), shape, str(sha256))
    return Sensitivity(unpack_moment(file.array(_NAME), config.hidden_size), int(file.array("tokens")[0]))


def damaged_file(folder: Path, hashes: Mapping[int, str]) -> Path | None:
    """The first of these layers' files that is gone, or not as it was written."""
    for layer, sha256 in hashes.items():
        file = folder / sensitivity_file(layer)
        if not file.is_file() or UnchangedFile(file, CalibrationError).sha256() != sha256:
            return file
    return None
