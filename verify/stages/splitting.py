"""How the engine splits texts into tokens, beside how the file's tokenizer does: other tokens are other inputs.

The engine reads a file's vocabulary and merges, and ignores its pre_tokenizer: it splits every text by a pattern of its
own. Both are held against each other on the evaluation text that comes with mq-quant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from ...formats.engine_rules import SPLITTING
from ...formats.errors import TokenError
from ...formats.hfq import HfqFile
from ...formats.text import shown
from ...formats.tokenizer import TextTokenizer
from ...formats.tokenizer.text_tokenizer import Encoded
from ...texts import evaluation_text


@dataclass(frozen=True)
class SplitDifference:
    """Tokens of a text that only one way of splitting it makes: how many of the file's, of all of them, and the text
    around the first.
    """

    different: int
    tokens: int
    first: str


def split_notes(file: HfqFile) -> tuple[str, ...]:
    """A warning where the engine makes other tokens of the evaluation text than the file's tokenizer."""
    text = file.metadata.get("tokenizer")
    if not isinstance(text, str):
        return ()
    try:
        found = _on_the_evaluation_text(text)
    except TokenError as e:
        return (f"whether the engine splits texts as the file's tokenizer does cannot be told: {e.problem}",)
    if found is None:
        return ()
    return (
        f"the engine ignores the tokenizer's pre_tokenizer and splits texts by a pattern of its own: of the evaluation "
        f"text {found.different} of {found.tokens} tokens come out otherwise, the first in {shown(found.first)}; give "
        "the engine token ids where that matters",
    )


@lru_cache(maxsize=1)
def _on_the_evaluation_text(tokenizer: str) -> SplitDifference | None:
    """Kept, since many files of one model have one tokenizer."""
    return split_difference(TextTokenizer(tokenizer, "tokenizer"), evaluation_text())


def split_difference(tokenizer: TextTokenizer, text: str) -> SplitDifference | None:
    """How the tokens of a text differ where it is split by the engine's pattern; None where they do not. TokenError."""
    mine, theirs = (_places(t.encode(text), len(text)) for t in (tokenizer, tokenizer.split_by(SPLITTING)))
    only = {start: end for (start, end), i in mine.items() if theirs.get((start, end)) != i}
    if not only:
        return None
    start = min(only)
    return SplitDifference(len(only), len(mine), text[max(0, start - 10) : only[start] + 10])


def _places(encoded: Encoded, length: int) -> Mapping[tuple[int, int], int]:
    """Each token's id by the characters at which it starts and ends; tokens of parts of one character count once."""
    ends = [after for _, after in pairwise([*encoded.starts.tolist(), length])]
    return dict(zip(zip(encoded.starts.tolist(), ends, strict=True), encoded.ids.tolist(), strict=True))
