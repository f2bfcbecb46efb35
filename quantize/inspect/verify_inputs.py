"""What `mq-quant verify` needs besides the file: its tier's bars, the source, the imatrix and the tokens.

Depends on formats, verify, recipe and sources.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...formats.checkpoint.local import open_checkpoint
from ...formats.checkpoint.source import Source
from ...formats.errors import CheckpointError, MqError, RecipeError
from ...formats.hfq import HfqFile
from ...formats.hfq.provenance import Provenance, RecipeRecord
from ...formats.minimax import parse_config
from ...formats.statistics.imatrix import read_imatrix
from ...verify.bars import Bars
from ...verify.run import Request
from ...verify.stages.generation import tokenizer_of
from ..spec.places import TINY, local_folder
from ..spec.recipe import DEFAULT_MODEL, load_recipe, load_tier, tiers

SEQUENCE = 128
CONTEXT = 16
"""Held-out tokens that a continuation begins with."""
PROMPT = "The quick brown fox"
TOKEN_LIMIT = 64 << 20
EVAL_TOKENS = "eval_tokens.npy"
IMATRIX = "imatrix.gguf"


class TokenError(MqError):
    """Token ids that cannot be read."""


@dataclass(frozen=True)
class Wanted:
    """The options of `verify` that say what to compare with."""

    source: str | None = None
    imatrix: Path | None = None
    recipe: Path | None = None
    tokens: int = 64
    prompt: str | None = None
    chat: bool = False
    token_file: Path | None = None
    sample: bool = False
    generate: int = 16
    dump: Path | None = None


def request_of(file: HfqFile, wanted: Wanted) -> Request:
    """Resolve the options for one file; raises the error of whatever cannot be used."""
    built_with = Provenance.of(file).recipe
    bars = _bars(built_with, wanted.recipe)
    folder = _source_folder(built_with, wanted.source)
    source: Source | None = None
    if folder is not None:
        checkpoint = open_checkpoint(folder)
        checkpoint.validate()
        source = checkpoint
    imatrix = wanted.imatrix or (folder / IMATRIX if folder and (folder / IMATRIX).is_file() else None)
    tokens = _tokens(file, wanted, folder)
    return Request(
        source=source,
        imatrix=read_imatrix(imatrix) if imatrix else None,
        tokens=tokens if source else None,
        prompt=None if tokens is None else tokens[0] if wanted.prompt is not None else tokens[0, :CONTEXT],
        bars=bars.model_copy(update={"coherence": bars.coherence or wanted.prompt is not None}),
        sample=wanted.sample,
        generate=wanted.generate,
        dump=wanted.dump,
    )


def _bars(built_with: RecipeRecord | None, path: Path | None) -> Bars:
    """The bars of the given recipe, or of the bundled tier that the file was built as; none for other files."""
    if path is not None:
        return load_recipe(path).verify
    if built_with is None or built_with.tier is None:
        return Bars()
    model = TINY if built_with.model == TINY else DEFAULT_MODEL
    return load_tier(built_with.tier, model).verify if built_with.tier in tiers(model) else Bars()


def _source_folder(built_with: RecipeRecord | None, source: str | None) -> Path | None:
    """The folder to compare with; a file of the tiny source is compared with it unasked."""
    if source is None:
        return local_folder(TINY) if built_with and built_with.repository == TINY else None
    folder = local_folder(source)
    if folder is None:
        raise CheckpointError(
            f"verify compares with a checkpoint on this machine, and {source} is a hub repository",
            hint="fetch it with `hf download` and give its folder, or leave --source out",
        )
    return folder


def _tokens(file: HfqFile, wanted: Wanted, folder: Path | None) -> NDArray[np.int64] | None:
    """Token ids [n_seq, len]: of --token-file, of --prompt, or held-out tokens that lie beside the source."""
    if wanted.token_file is not None:
        return read_tokens(wanted.token_file)
    if wanted.prompt is not None:
        tokenizer = tokenizer_of(file)
        if tokenizer is None:
            raise RecipeError("--prompt needs a tokenizer, and the file has none", file=file.path)
        text = chat_text(file, wanted.prompt) if wanted.chat else wanted.prompt
        return np.array([tokenizer.encode(text).ids], np.int64)
    if wanted.tokens == 0:
        return None
    if folder is not None and (folder / EVAL_TOKENS).is_file():
        return cut(read_tokens(folder / EVAL_TOKENS), wanted.tokens)
    tokenizer = tokenizer_of(file)
    if tokenizer is not None:
        ids = np.array(tokenizer.encode(PROMPT).ids, np.int64)
        return np.resize(ids, (1, min(len(ids), wanted.tokens)))
    vocab = parse_config(file.metadata.get("config") or {}).vocab_size
    return (np.arange(wanted.tokens, dtype=np.int64) * 7919 % vocab).reshape(1, -1)


def chat_text(file: HfqFile, prompt: str) -> str:
    """The prompt as a user's message, put through the file's chat template in a sandbox; TokenError where it fails."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = file.metadata.get("tokenizer_config")
    template = config.get("chat_template") if isinstance(config, Mapping) else None
    if not isinstance(template, str):
        raise TokenError("--chat needs a chat template, and the file has none", file=file.path)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": prompt}]
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as e:
        raise TokenError(f"its chat template cannot be used: {e}", file=file.path) from None


def cut(tokens: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """About `count` of token ids [n_seq, len], in sequences of at most SEQUENCE."""
    length = min(count, SEQUENCE, tokens.shape[1])
    return tokens[: max(1, count // length), :length]


def read_tokens(path: Path) -> NDArray[np.int64]:
    """Token ids [n_seq, len] of a .npy array, or of text with one sequence of equal length per line; TokenError."""
    try:
        with path.open("rb") as f:
            raw = f.read(TOKEN_LIMIT + 1)
    except OSError as e:
        raise TokenError(f"cannot be read: {e.strerror}", file=path) from None
    if len(raw) > TOKEN_LIMIT:
        raise TokenError(f"is larger than {TOKEN_LIMIT} bytes", file=path)
    try:
        if raw.startswith(b"\x93NUMPY"):
            ids = np.load(io.BytesIO(raw), allow_pickle=False)
        else:
            ids = np.array(
                [[int(word) for word in line.split()] for line in raw.decode().splitlines() if line.strip()]
            )
    except (ValueError, OSError, EOFError) as e:
        raise TokenError(f"does not hold token ids: {e}", file=path) from None
    if ids.ndim not in (1, 2) or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise TokenError(f"holds {ids.dtype} {list(ids.shape)}, not token ids [sequences, length]", file=path)
    return np.atleast_2d(ids).astype(np.int64)
