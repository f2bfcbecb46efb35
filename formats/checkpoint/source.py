"""`Source`: what every room may ask of a checkpoint, wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..minimax import ModelConfig
from ..watch import UNWATCHED, Watch
from .safetensors_file import TensorInfo

JSON_LIMIT = 32 << 20
"""Bytes of the largest JSON file that is read."""

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


class Source(Protocol):
    """A checkpoint that hands out one tensor at a time. Safe for several threads."""

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it is."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The dimensions that config.json gives."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor that the shards hold, scales and tensors that are left out included."""
        ...

    @property
    def shards(self) -> tuple[str, ...]:
        """The names of the shards, sorted."""
        ...

    @property
    def skipped_mtp(self) -> tuple[str, ...]:
        """Names that belong to multi-token-prediction modules, which are left out."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user: which files and tensors of the checkpoint are not used, and why."""
        ...

    @property
    def origin(self) -> dict[str, str]:
        """Where the checkpoint came from: a folder's name, or a repository and its resolved revision."""
        ...

    def validate(self) -> None:
        """Check inventory and tokenizer against the config on metadata alone; CheckpointError, TokenError."""
        ...

    def side_file(self, name: str) -> Path | None:
        """The path of one of SIDE_FILES, or None where the checkpoint has none."""
        ...

    def schedule(self, names: Sequence[str]) -> None:
        """Say which weights will be asked for, and about in which order; each is released once.

        Between the two calls a weight may be asked for any number of times, out of order too.
        """
        ...

    def weight(self, name: str) -> F32:
        """One tensor, dequantised to f32 of its shape.

        Raises CheckpointError where there is no such tensor or its shard has changed, WeightError for NaN codes,
        values that are not finite, and a weight of zeros only.
        """
        ...

    def rows(self, name: str, low: int, high: int) -> F32:
        """Rows low to high of a tensor that is not FP8, f32 [high - low, ...]; errors as `weight`.

        A large tensor is never held whole.
        """
        ...

    def stored(self, name: str) -> tuple[U8, F32]:
        """An FP8 matrix as it is stored: codes u8 [R, C] and scales f32, one for each block of `config.block_shape`.

        `fp8.E4M3[codes]` times the block's scale, in f32, has the bits of `weight`. Errors as `weight`, and WeightError
        where the tensor is not FP8.
        """
        ...

    def release(self, name: str) -> None:
        """Say that a weight of the schedule is not needed again."""
        ...

    def fingerprint(self, watch: Watch = UNWATCHED) -> dict[str, dict[str, Any]]:
        """{file name: {bytes, sha256}} of config, side files and shards: equal exactly for equal checkpoints.

        `watch` hears of what is hashed. Every later read gives the bytes that were hashed, or an error.
        """
        ...

    def disk_bytes(self) -> int:
        """The most disk that fetched shards will take at any time."""
        ...

    def close(self) -> None:
        """Stop what runs in the background and remove what was fetched."""
        ...


def lies_here(source: Source) -> bool:
    """Whether nothing of a source is fetched, so that it may be read again and again."""
    return source.disk_bytes() == 0
