"""A greedy continuation through the kernels, and the coherence gate that tells words from a repetition loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.tokenizer import TextTokenizer
from ...kernels.runtime.host import Backend
from ..model.kernel_forward import KernelModel
from .stage import Stage

MOST_FREQUENT = 0.5
UNIQUE = 0.3
SHORTEST = 16
"""Tokens under which coherence is not judged."""


def tokenizer_of(file: HfqFile) -> TextTokenizer | None:
    """The file's tokenizer, or None where it has none; TokenError where it cannot be used."""
    text = file.metadata.get("tokenizer")
    return TextTokenizer(text, file.path) if isinstance(text, str) else None


def stop_tokens(file: HfqFile) -> frozenset[int]:
    """The ids that end a text: those of generation_config, or else of config."""
    for key in ("generation_config", "config"):
        record = file.metadata.get(key)
        found = record.get("eos_token_id") if isinstance(record, Mapping) else None
        ids = found if isinstance(found, list) else [found]
        numbers = [i for i in ids if type(i) is int]
        if len(numbers) == len(ids):
            return frozenset(numbers)
    return frozenset()


def coherence(text: str) -> tuple[str | None, dict[str, Any]]:
    """What the gate has against a text, or None, and its figures: words, shares of the most frequent and of unique."""
    words = text.split()
    if not words:
        return "no word came out", {"words": 0}
    counts = Counter(words)
    word, times = counts.most_common(1)[0]
    frequent, unique = times / len(words), len(counts) / len(words)
    figures = {"words": len(words), "most_frequent": round(frequent, 4), "unique": round(unique, 4)}
    if frequent > MOST_FREQUENT:
        return f"the word {word!r} makes up {frequent:.0%} of the continuation", figures
    if unique < UNIQUE:
        return f"only {unique:.0%} of the continuation's words are different", figures
    return None, figures


def check_generation(
    file: HfqFile,
    cfg: ModelConfig,
    backend: Backend,
    prompt: NDArray[np.integer],
    count: int,
    gate: bool,
) -> Stage:
    """Continue a prompt (ids [n]) greedily by `count` tokens; with `gate` an incoherent text is a problem."""
    model = KernelModel(file, cfg, backend, len(prompt) + count)
    ids = model.greedy(prompt, count, stop_tokens(file))
    values: dict[str, Any] = {"prompt_ids": prompt.tolist(), "ids": ids}
    tokenizer = tokenizer_of(file)
    if tokenizer is None:
        return Stage(
            "generation", len(ids), "tokens", (), ("no tokenizer, so coherence was not judged",), values
        )
    text = tokenizer.decode(ids)
    complaint, found = coherence(text)
    values |= {"prompt": tokenizer.decode(prompt.tolist()), "text": text, "gated": gate, **found}
    if len(ids) < SHORTEST:
        note = f"{len(ids)} tokens are too few to judge coherence by"
        return Stage("generation", len(ids), "tokens", (), (note,), values)
    said = (f"coherence: {complaint}",) if complaint else ()
    return Stage("generation", len(ids), "tokens", said if gate else (), () if gate else said, values)
