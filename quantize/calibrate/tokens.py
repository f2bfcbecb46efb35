"""Calibration tokens: ids from a .npy file or from a text, held against the model's vocabulary before any work.

Depends on formats (checkpoint, minimax, errors) and, for a text, on the tokenizers package.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.checkpoint.source import Source
from ...formats.errors import CalibrationError, CheckpointError
from ...formats.minimax import ModelConfig

LENGTH = 512
"""Tokens per sequence where a text is cut up."""

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class TokenRequest:
    """A text or a .npy of ids, one of the two, and how much of it: all sequences where `sequences` is None."""

    text: Path | None = None
    tokens: Path | None = None
    sequences: int | None = None
    length: int = LENGTH


def read_tokens(path: Path, config: ModelConfig, sequences: int | None = None) -> Tokens:
    """Token ids i32 [sequences, length] of a .npy file, the first `sequences` of them; CalibrationError."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise CalibrationError(f"cannot be read as a .npy file: {e}", file=path) from None
    if (
        not isinstance(tokens, np.ndarray)
        or tokens.ndim != 2
        or tokens.dtype.kind not in "iu"
        or not tokens.size
    ):
        shape = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        raise CalibrationError(f"holds {shape}, not whole numbers [sequences, length]", file=path)
    return check_tokens(_first(tokens, sequences, path), config, path)


def tokenize(path: Path, source: Source, length: int = LENGTH, sequences: int | None = None) -> Tokens:
    """A UTF-8 text as token ids i32 [sequences, length], cut one after the other; the rest is dropped.

    Raises CalibrationError where the text is shorter than asked, or than one sequence.
    """
    from tokenizers import Tokenizer

    side = source.side_file("tokenizer.json")
    if side is None:
        raise CheckpointError("has no tokenizer.json, which --text needs", hint="give --tokens instead")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"cannot be read as UTF-8 text: {e}", file=path) from None
    try:
        ids = Tokenizer.from_file(str(side)).encode(text, add_special_tokens=False).ids
    except Exception as e:  # the package raises plain Exception for files that it cannot use
        raise CalibrationError(f"the tokenizer cannot be used: {e}", file=side) from None
    whole = len(ids) // length
    if whole < (sequences or 1):
        raise CalibrationError(
            f"is {len(ids)} tokens, shorter than {sequences or 1} sequences of {length}",
            file=path,
            hint="give more text, or ask for less with --sequences and --length",
        )
    cut = np.array(ids[: whole * length], np.int64).reshape(whole, length)
    return check_tokens(_first(cut, sequences, path), source.config, path)


def _first(tokens: NDArray[Any], sequences: int | None, path: Path) -> NDArray[Any]:
    if sequences is not None and len(tokens) < sequences:
        raise CalibrationError(
            f"holds {len(tokens)} sequences, fewer than the {sequences} asked for",
            file=path,
            hint="give more text, or ask for less with --sequences",
        )
    return tokens if sequences is None else tokens[:sequences]


def check_tokens(tokens: NDArray[Any], config: ModelConfig, path: Path) -> Tokens:
    """Ids as i32; CalibrationError for ids outside the vocabulary and sequences longer than the model's positions."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise CalibrationError(
            f"holds token {wrong}, outside the vocabulary of {config.vocab_size}",
            file=path,
            hint="the tokens are of another model's tokenizer",
        )
    if tokens.shape[1] > config.max_position_embeddings:
        raise CalibrationError(
            f"has sequences of {tokens.shape[1]}, the model {config.max_position_embeddings} positions",
            file=path,
        )
    return np.ascontiguousarray(tokens, np.int32)


def token_record(tokens: Tokens) -> dict[str, Any]:
    """What a manifest says of its tokens."""
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    return {"sha256": digest, "sequences": tokens.shape[0], "length": tokens.shape[1]}


def load_tokens(source: Source, request: TokenRequest) -> Tokens:
    """Token ids i32 [sequences, length] as they were asked for; CalibrationError."""
    if request.tokens is not None:
        return read_tokens(request.tokens, source.config, request.sequences)
    assert request.text is not None
    return tokenize(request.text, source, request.length, request.sequences)
