"""The tokens that `verify` runs: of --token-file, of --prompt, or held-out ones that lie beside the source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import TokenError
from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.tokenizer import render_chat
from ...verify.stages.generation import tokenizer_of
from ..calibrate.token_file import read_token_file
from ..calibrate.tokens import check_tokens

SEQUENCE = 128
PROMPT = "The quick brown fox"
EVAL_TOKENS = "eval_tokens.npy"

Ids = NDArray[np.int64]


def read_tokens(path: Path, config: ModelConfig) -> Ids:
    """Token ids i64 [sequences, length] of a file, in which one dimension is one sequence; TokenError."""
    return check_tokens(np.atleast_2d(read_token_file(path)), config, path).astype(np.int64)


def prompt_tokens(file: HfqFile, config: ModelConfig, prompt: str, chat: bool) -> Ids:
    """Token ids i64 [1, length] of a prompt, with `chat` as a user's message in the file's chat template; TokenError.

    A plain prompt gets the tokens that the tokenizer puts around every text, such as BOS. A chat template writes its
    own, so none are put around what it makes.
    """
    tokenizer = tokenizer_of(file)
    if tokenizer is None:
        raise TokenError("--prompt needs a tokenizer, and the file has none", file=file.path)
    if not _is_text(prompt):
        raise TokenError("--prompt holds bytes that are not UTF-8 text", hint="check the terminal's encoding")
    ids = tokenizer.ids(chat_text(file, prompt), False) if chat else tokenizer.ids(prompt, True)
    if not ids:
        raise TokenError("the prompt gives no token", file=file.path, hint="give --prompt some text")
    return check_tokens(np.array([ids]), config, f"{file.path}: tokens of --prompt").astype(np.int64)


def _is_text(prompt: str) -> bool:
    """Whether an argument is text: Python stands half characters in the place of bytes that are not."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def chat_text(file: HfqFile, prompt: str) -> str:
    """The prompt as a user's message, put through the file's chat template; TokenError where that fails."""
    config = file.metadata.get("tokenizer_config")
    found = config if isinstance(config, Mapping) else {}
    return render_chat(found, [{"role": "user", "content": prompt}], file.path)


def held_out_tokens(file: HfqFile, config: ModelConfig, count: int, folder: Path | None) -> Ids:
    """About `count` token ids i64 [sequences, length] to compare with the source on.

    They are those of EVAL_TOKENS beside the source, or else of a fixed text, or, without a tokenizer, fixed ids.
    """
    if folder is not None and (folder / EVAL_TOKENS).is_file():
        return cut(read_tokens(folder / EVAL_TOKENS, config), count)
    tokenizer = tokenizer_of(file)
    ids = tokenizer.ids(PROMPT, True)[:count] if tokenizer else []
    if not ids:
        length = min(count, config.max_position_embeddings)
        return (np.arange(length, dtype=np.int64) * 7919 % config.vocab_size).reshape(1, -1)
    return check_tokens(np.array([ids]), config, f"{file.path}: tokens of its tokenizer").astype(np.int64)


def cut(tokens: Ids, count: int) -> Ids:
    """About `count` of token ids [n_seq, len], in sequences of at most SEQUENCE."""
    length = min(count, SEQUENCE, tokens.shape[1])
    return tokens[: max(1, count // length), :length]
