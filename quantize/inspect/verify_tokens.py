"""The tokens that `verify` runs: of --token-file, of --prompt, or held-out ones that lie beside the source."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import TokenError
from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.tokenizer import TextTokenizer, render_chat
from ...texts import evaluation_text
from ...verify.stages.generation import tokenizer_of
from ..calibrate.text import text_tokens
from ..calibrate.token_file import read_token_file
from ..calibrate.tokens import check_tokens

SEQUENCE = 128
WINDOW = 1 << 16
"""Characters of the text that are tokenised at a time: most of it is not needed."""
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
    """About `count` token ids i64 [sequences, length] to judge by.

    They are those of EVAL_TOKENS beside the source where there are so many, else of the evaluation text that comes with
    mq-quant, or, without a tokenizer, fixed ids.
    """
    if folder is not None and (folder / EVAL_TOKENS).is_file():
        held_out = read_tokens(folder / EVAL_TOKENS, config)
        if held_out.size >= count:
            return cut(held_out, count)
    length = min(count, SEQUENCE, config.max_position_embeddings)
    needed = -(-count // length) * length
    tokenizer = tokenizer_of(file)
    if tokenizer is None:
        ids = np.arange(needed, dtype=np.int64) * 7919 % config.vocab_size
    else:
        ids = _beginning(tokenizer, needed)
    whole = ids[: ids.size // length * length].reshape(-1, length)
    return check_tokens(whole, config, f"{file.path}: tokens of its tokenizer").astype(np.int64)


def _beginning(tokenizer: TextTokenizer, count: int) -> Ids:
    """At least `count` tokens of the evaluation text, or all of them."""
    parts = [np.empty(0, np.int64)]
    with closing(text_tokens(evaluation_text(), tokenizer, WINDOW)) as found:
        for ids in found:
            parts.append(ids.astype(np.int64))
            if sum(map(len, parts)) >= count:
                break
    return np.concatenate(parts)


def cut(tokens: Ids, count: int) -> Ids:
    """About `count` of token ids [n_seq, len], in sequences of at most SEQUENCE."""
    length = min(count, SEQUENCE, tokens.shape[1])
    return tokens[: max(1, count // length), :length]
