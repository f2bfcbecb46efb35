"""Stage 6: a greedy continuation through the kernels, and the gate that tells words from a repetition loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.tokenizer import TextTokenizer
from ...formats.watch import UNWATCHED, Watch
from ...kernels.runtime.host import Backend
from ..model.kernel_forward import KernelModel
from .stage import StageResult

MOST_FREQUENT = 0.5
UNIQUE = 0.3
"""A text is incoherent where one word makes up more than this share of it, or fewer than this share are different."""
SHORTEST = 16
"""Tokens under which coherence is not judged."""


@dataclass(frozen=True)
class Coherence:
    """The gate's figures: the number of words, and the shares of the most frequent word and of different words."""

    words: int
    most_frequent: float | None = None
    unique: float | None = None


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation; without a tokenizer only its ids are known, and the other fields are None.

    `gated` says whether an incoherent text fails the stage.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    prompt: str | None = None
    text: str | None = None
    gated: bool = False
    coherence: Coherence | None = None

    def as_json(self) -> dict[str, Any]:
        known: dict[str, Any] = {"prompt_ids": list(self.prompt_ids), "ids": list(self.ids)}
        if self.text is None or self.coherence is None:
            return known
        judged = {key: value for key, value in asdict(self.coherence).items() if value is not None}
        return {**known, "prompt": self.prompt, "text": self.text, "gated": self.gated, **judged}


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


def coherence(text: str) -> tuple[str | None, Coherence]:
    """What the gate has against a text (None: nothing), and its figures."""
    words = text.split()
    if not words:
        return "no word came out", Coherence(0)
    counts = Counter(words)
    word, times = counts.most_common(1)[0]
    frequent, unique = times / len(words), len(counts) / len(words)
    figures = Coherence(len(words), round(frequent, 4), round(unique, 4))
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
    watch: Watch = UNWATCHED,
) -> StageResult:
    """Continue a prompt (ids [n]) greedily by `count` tokens; with `gate` an incoherent text is a problem."""
    model = KernelModel(file, cfg, backend, len(prompt) + count)
    watch.begin("generation", count, "tokens")
    ids = model.greedy(prompt, count, stop_tokens(file), watch)
    asked, made = tuple(prompt.tolist()), tuple(ids)

    def result(figures: Continuation, problems: tuple[str, ...], *notes: str) -> StageResult:
        return StageResult("generation", len(ids), "tokens", problems, notes, figures)

    tokenizer = tokenizer_of(file)
    if tokenizer is None:
        return result(Continuation(asked, made), (), "no tokenizer, so coherence was not judged")
    text = tokenizer.decode(ids)
    complaint, judged = coherence(text)
    figures = Continuation(asked, made, tokenizer.decode(list(asked)), text, gate, judged)
    if len(ids) < SHORTEST:
        return result(figures, (), f"{len(ids)} tokens are too few to judge coherence by")
    said = (f"coherence: {complaint}",) if complaint else ()
    return result(figures, said) if gate else result(figures, (), *said)
