"""What `mq-quant verify` needs besides the file: its tier's bars, the source, the imatrix and the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...formats.checkpoint.local import open_checkpoint
from ...formats.checkpoint.source import Source
from ...formats.errors import CheckpointError, MqError, TokenError
from ...formats.hfq import HfqFile
from ...formats.hfq.provenance import Provenance, RecipeRecord
from ...formats.minimax import parse_config
from ...formats.statistics.imatrix import read_imatrix
from ...verify.bars import Bars
from ...verify.run import VerifyInputs
from ..spec.places import TINY, local_folder
from ..spec.recipe import DEFAULT_MODEL, load_recipe, load_tier, tiers
from .verify_tokens import EVAL_TOKENS, held_out_tokens, prompt_tokens, read_tokens

CONTEXT = 16
"""Held-out tokens that a continuation begins with."""
IMATRIX = "imatrix.gguf"


@dataclass(frozen=True)
class VerifyOptions:
    """What the user says about what to compare a file with, as the options of `verify`."""

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


def inputs_of(file: HfqFile, options: VerifyOptions) -> VerifyInputs:
    """Open and read what the options name, for one file; raises the error of whatever cannot be used."""
    built_with = Provenance.of(file).recipe
    bars = _bars(built_with, options.recipe)
    folder = _source_folder(built_with, options.source)
    source: Source | None = None
    if folder is not None:
        checkpoint = open_checkpoint(folder)
        checkpoint.validate()
        source = checkpoint
    imatrix = options.imatrix or (folder / IMATRIX if folder and (folder / IMATRIX).is_file() else None)
    tokens = _tokens(file, options, folder)
    return VerifyInputs(
        source=source,
        imatrix=read_imatrix(imatrix) if imatrix else None,
        tokens=tokens if source else None,
        prompt=None if tokens is None else tokens[0] if options.prompt is not None else tokens[0, :CONTEXT],
        bars=bars.model_copy(update={"coherence": bars.coherence or options.prompt is not None}),
        sample=options.sample,
        generate=options.generate,
        dump=options.dump,
        notes=_notes(tokens, options, folder),
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
        return read_tokens(options.token_file, config)
    if options.prompt is not None:
        return prompt_tokens(file, config, options.prompt, options.chat)
    return held_out_tokens(file, config, options.tokens, folder) if options.tokens else None


def _notes(tokens: NDArray[np.int64] | None, options: VerifyOptions, folder: Path | None) -> tuple[str, ...]:
    """What should be known of tokens that the user has not chosen: that they are no text of the model's, or few."""
    if tokens is None or options.token_file is not None or options.prompt is not None:
        return ()
    notes = []
    if folder is None or not (folder / EVAL_TOKENS).is_file():
        notes.append(
            f"the source has no {EVAL_TOKENS}, so a few fixed tokens were run; --token-file takes others"
        )
    if 2 * tokens.size < options.tokens:
        notes.append(f"there are only {tokens.size} of the {options.tokens} tokens that were asked for")
    return tuple(notes)
