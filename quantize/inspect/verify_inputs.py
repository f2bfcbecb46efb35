"""What `mq-quant verify` needs besides the file: its tier's bars, the source, the imatrix and the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import InputError, MqError, TokenError
from ...formats.hfq import HfqFile
from ...formats.hfq.provenance import Provenance, RecipeRecord
from ...formats.minimax import parse_config
from ...formats.statistics.imatrix import read_imatrix
from ...verify.model.metrics import FEWEST
from ...verify.run import VerifyInputs
from ...verify.stages.generation import tokenizer_of
from ..spec.places import TINY, local_folder, open_place
from ..spec.recipe import load_recipe
from .tier_bars import bars_of
from .verify_tokens import held_out_tokens, prompt_tokens, read_tokens

CONTEXT = 16
"""Held-out tokens that a continuation begins with."""
IMATRIX = "imatrix.gguf"


@dataclass(frozen=True)
class VerifyOptions:
    """What the user says about what to compare a file with, as the options of `verify`.

    `tokens` is about how many tokens are run; None means FEWEST, and that fewer are not judged by.
    """

    source: str | None = None
    imatrix: Path | None = None
    recipe: Path | None = None
    tokens: int | None = None
    prompt: str | None = None
    chat: bool = False
    token_file: Path | None = None
    sample: bool = False
    generate: int = 16
    dump: Path | None = None
    revision: str | None = None
    shard_cache: int = 2


def inputs_of(file: HfqFile, options: VerifyOptions) -> VerifyInputs:
    """Open and read what the options name, for one file; raises the error of whatever cannot be used."""
    built_with = Provenance.of(file).recipe
    bars = load_recipe(options.recipe).verify if options.recipe else bars_of(file, built_with)
    place = _place(built_with, options.source)
    folder = local_folder(place) if place else None
    if place is None and (options.imatrix is not None or options.revision is not None):
        unused = "--imatrix weighs" if options.imatrix is not None else "--revision names"
        what = "errors against the source" if options.imatrix is not None else "a version of the source"
        raise InputError(f"{unused} {what}, and none is given", hint="give --source too, or leave it out")
    source = open_place(place, options.revision, options.shard_cache, Path()) if place else None
    if source is not None:
        source.validate()
    imatrix = options.imatrix or (folder / IMATRIX if folder and (folder / IMATRIX).is_file() else None)
    tokens = _tokens(file, options, folder)
    return VerifyInputs(
        source=source,
        imatrix=read_imatrix(imatrix) if imatrix else None,
        tokens=tokens,
        prompt=None if tokens is None else tokens[0] if options.prompt is not None else tokens[0, :CONTEXT],
        bars=bars.model_copy(update={"coherence": bars.coherence or options.prompt is not None}),
        sample=options.sample,
        generate=options.generate,
        dump=options.dump,
        fewest=FEWEST if options.tokens is None else min(FEWEST, options.tokens),
        notes=_notes(file, tokens, options),
        unjudged=_unjudged(tokens, options),
    )


def _place(built_with: RecipeRecord | None, source: str | None) -> str | None:
    """The source to compare with; a file of the tiny source is compared with it unasked."""
    if source is None:
        return TINY if built_with and built_with.repository == TINY else None
    return source


def _tokens(file: HfqFile, options: VerifyOptions, folder: Path | None) -> NDArray[np.int64] | None:
    """Token ids [n_seq, len]: of --token-file, of --prompt, or held-out tokens that lie beside the source.

    None where none are asked for, and where the file's config is unreadable, so that no model could run them.
    """
    try:
        config = parse_config(file.metadata.get("config") or {})
    except MqError:
        return None
    if options.generate > config.max_position_embeddings:
        raise TokenError(
            f"--generate {options.generate} is more than the model's {config.max_position_embeddings} positions",
            file=file.path,
        )
    if options.token_file is not None:
        return _first(read_tokens(options.token_file, config), options.tokens)
    if options.prompt is not None:
        return prompt_tokens(file, config, options.prompt, options.chat)
    wanted = FEWEST if options.tokens is None else options.tokens
    return held_out_tokens(file, config, wanted, folder) if wanted else None


def _first(tokens: NDArray[np.int64], wanted: int | None) -> NDArray[np.int64]:
    """About so many of token ids [n_seq, len], the first ones; all without a number."""
    if wanted is None or wanted >= tokens.size:
        return tokens
    length = min(wanted, tokens.shape[1])
    return tokens[: -(-wanted // length), :length]


def _notes(file: HfqFile, tokens: NDArray[np.int64] | None, options: VerifyOptions) -> tuple[str, ...]:
    """What should be known of tokens that the user has not chosen: that they are no text."""
    if tokens is None or options.token_file is not None or options.prompt is not None:
        return ()
    if tokenizer_of(file) is None:
        return (
            "the file has no tokenizer, so fixed ids were run, which are no text; --token-file takes others",
        )
    return ()


def _unjudged(tokens: NDArray[np.int64] | None, options: VerifyOptions) -> str | None:
    """Why the predictions at a prompt's positions are not judged; None where they are."""
    if tokens is None or options.prompt is None or options.tokens is not None or tokens.size >= FEWEST:
        return None
    return f"the prompt has {tokens.size} positions, and fewer than {FEWEST} judge nothing; --tokens {tokens.size} does"
