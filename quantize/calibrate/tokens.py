"""Calibration tokens: ids from a file or from a text, held against the model's vocabulary before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.checkpoint.names import TOKENIZER
from ...formats.checkpoint.source import Source
from ...formats.errors import CheckpointError, InputError, TokenError
from ...formats.minimax import ModelConfig
from ...formats.tokenizer import TextTokenizer
from ...texts import calibration_text, evaluation_text
from ..spec.calibration_sizes import USUAL_TOKENS
from .text import text_tokens
from .token_file import TOKEN_LIMIT, read_token_file

LENGTH = 512
"""Tokens per sequence where a text is cut up."""

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class TokenRequest:
    """A text or a file of ids, and how much of it; without both, the text that travels with the package.

    Where `sequences` is None, all of a text or file given by hand is taken, and of the package's own text as much as
    USUAL_TOKENS, or what the text has.
    """

    text: Path | None = None
    tokens: Path | None = None
    sequences: int | None = None
    length: int = LENGTH

    @property
    def bundled(self) -> bool:
        """Whether the tokens are of the text that travels with the package."""
        return self.text is None and self.tokens is None


def own_text(ids: object | None, sequences: int | None, length: int | None) -> TokenRequest:
    """What `sequences` and `length` ask of the text that travels with the package.

    Raises InputError where they are given beside token ids, which are taken as they are.
    """
    if ids is not None and not (sequences is None and length is None):
        raise InputError("tokens are taken as they are: leave sequences and length out")
    return TokenRequest(sequences=sequences, length=LENGTH if length is None else length)


@dataclass(frozen=True)
class OwnText:
    """A text that travels with the package; `name` is what errors call it."""

    name: str
    read: Callable[[], str]


CALIBRATION = OwnText("the calibration text of mq-quant", calibration_text)
EVALUATION = OwnText("the evaluation text of mq-quant", evaluation_text)


def load_tokens(source: Source, request: TokenRequest, own: OwnText = CALIBRATION) -> Tokens:
    """Token ids i32 [sequences, length] as they were asked for; TokenError, CheckpointError."""
    if request.tokens is not None:
        return read_tokens(request.tokens, source.config, request.sequences)
    if request.text is not None:
        return tokenize(request.text, source, request.length, request.sequences)
    return bundled_tokens(source, request.length, request.sequences, own)


def bundled_tokens(
    source: Source, length: int = LENGTH, sequences: int | None = None, own: OwnText = CALIBRATION
) -> Tokens:
    """The beginning of a text that travels with the package, as `tokenize` cuts it.

    Without `sequences` it is USUAL_TOKENS, or fewer where the text has fewer, in sequences no longer than the model's
    positions.
    """
    whole = min(length, source.config.max_position_embeddings) if sequences is None else length
    wanted = USUAL_TOKENS // whole if sequences is None else sequences
    return _cut(own.read(), own.name, source, whole, wanted, sequences)


def read_tokens(path: Path, config: ModelConfig, sequences: int | None = None) -> Tokens:
    """Token ids i32 [sequences, length] of a file, the first `sequences` of them; TokenError."""
    ids = read_token_file(path, sequences)
    if ids.ndim != 2:
        raise TokenError(
            f"holds {len(ids)} ids in one dimension, not whole numbers [sequences, length]",
            file=path,
            hint="cut them into sequences of equal length: ids[: n * length].reshape(n, length)",
        )
    if sequences is not None and len(ids) < sequences:
        raise TokenError(
            f"holds {len(ids)} sequences, fewer than the {sequences} asked for",
            file=path,
            hint="give more of them, or ask for less with --sequences",
        )
    return check_tokens(ids, config, path)


def tokenize(path: Path, source: Source, length: int = LENGTH, sequences: int | None = None) -> Tokens:
    """A UTF-8 text as token ids i32 [sequences, length], cut one after the other; the rest is dropped.

    No more of the text is read than is needed for `sequences`. Raises TokenError where the text is shorter than asked,
    or than one sequence, and CheckpointError where the source has no tokenizer.
    """
    return _cut(path, path, source, length, sequences, sequences or 1)


def _cut(
    text: Path | str,
    name: str | Path,
    source: Source,
    length: int,
    wanted: int | None,
    fewest: int | None,
) -> Tokens:
    """A text in sequences of `length`: `wanted` of them, or all; TokenError where there are less than `fewest`, or
    none. `name` is the text in errors.
    """
    side = source.side_file(TOKENIZER)
    if side is None:
        raise CheckpointError(
            "has no tokenizer.json, without which a text cannot be read", hint="give --tokens instead"
        )
    check_length(length, source.config, "--length")
    needed = None if wanted is None else wanted * length
    if needed is not None and needed > TOKEN_LIMIT:
        raise TokenError(f"{wanted} sequences of {length} are more than {TOKEN_LIMIT} tokens")
    parts, count = [np.empty(0, np.uint32)], 0
    with closing(text_tokens(text, TextTokenizer.open(side))) as found:
        for ids in found:
            parts.append(ids)
            count += len(ids)
            if needed is not None and count >= needed:
                break
            if count > TOKEN_LIMIT:
                raise TokenError(
                    f"has more than {TOKEN_LIMIT} tokens", file=name, hint="ask for less with --sequences"
                )
    if count < length * (fewest or 1):
        raise TokenError(
            f"is {count} tokens, shorter than {fewest or 1} sequences of {length}",
            file=name,
            hint="give more text, or ask for less with --sequences and --length",
        )
    whole = min(wanted or count // length, count // length)
    cut = np.concatenate(parts)[: whole * length].reshape(whole, length)
    return check_tokens(cut, source.config, name)


def check_tokens(tokens: NDArray[Any], config: ModelConfig, path: str | Path) -> Tokens:
    """Ids as i32; TokenError for ids outside the vocabulary and sequences longer than the model's positions."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise TokenError(
            f"holds token {wrong}, outside the vocabulary of {config.vocab_size}",
            file=path,
            hint="the tokens are of another model's tokenizer",
        )
    check_length(tokens.shape[1], config, path)
    return np.ascontiguousarray(tokens, np.int32)


def check_length(length: int, config: ModelConfig, where: str | Path) -> None:
    """TokenError where sequences of this length do not fit the model's positions."""
    if length > config.max_position_embeddings:
        raise TokenError(
            f"has sequences of {length} tokens, and the model {config.max_position_embeddings} positions",
            file=where,
        )


def token_record(tokens: Tokens) -> dict[str, Any]:
    """What a manifest says of its tokens."""
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    return {"sha256": digest, "sequences": tokens.shape[0], "length": tokens.shape[1]}
