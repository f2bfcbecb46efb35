"""Whether the engine can use a tokenizer.json with a model: its kind, its byte symbols, its merges, and its ids.

The engine takes a row of the embedding by each id, and makes a list as long as the largest one. Ids need not be dense,
and a model's vocabulary is often padded beyond its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import TokenError
from ..hfq.layout import METADATA_LIMIT
from ..plain_file import hint_of, open_plain
from ..strictjson import EMBEDDED_DEPTH, JsonError, parse_object
from ..text import shown

HINT = "give the tokenizer.json and the config.json of one model: fetch both again, or undo what added tokens"
"""What to do about such a file."""


def check_tokenizer(path: Path | None, vocab_size: int) -> None:
    """TokenError for a tokenizer.json that cannot be read, or that `vocabulary_problems` complains of."""
    if path is None:
        return
    try:
        with open_plain(path) as f:
            problems = vocabulary_problems(
                parse_object(f.read(METADATA_LIMIT + 1), EMBEDDED_DEPTH), vocab_size
            )
    except OSError as e:
        raise TokenError(f"cannot be read: {e.strerror}", file=path, hint=hint_of(e)) from None
    except JsonError as e:
        raise TokenError(str(e), file=path) from None
    for problem in problems:
        raise TokenError(problem, file=path, hint=HINT)


def vocabulary_problems(document: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    """What of a tokenizer.json does not go with the engine, or with a model that has so many embeddings: sentences
    whose subject is the file, the first of each kind alone.
    """
    model, added = document.get("model"), document.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vocab, Mapping) or not vocab:
        yield "is not a byte-level BPE tokenizer.json: it has no 'vocab' of tokens and ids in its 'model'"
        return
    if not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        yield "is not a byte-level BPE tokenizer.json: its 'added_tokens' is no list of objects"
        return
    missing = set(byte_symbols()) - vocab.keys()
    if missing:
        yield f"{len(missing)} of the 256 byte symbols are not in its vocabulary"
    named = [(token.get("content"), token.get("id")) for token in added]
    yield from _first(_id_problem(token, number, vocab_size) for token, number in (*vocab.items(), *named))
    tokens = {*vocab, *(token for token, _ in named if isinstance(token, str))}
    yield from _first(_merge_problem(merge, tokens) for merge in model.get("merges") or ())


def byte_symbols() -> list[str]:
    """The character that stands for each byte 0…255 in byte-level BPE (the GPT-2 table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + rest.index(b)) for b in range(256)]


def _first(problems: Iterator[str | None]) -> Iterator[str]:
    found = next((problem for problem in problems if problem), None)
    if found is not None:
        yield found


def _id_problem(token: Any, number: Any, vocab_size: int) -> str | None:
    if not isinstance(token, str) or isinstance(number, bool) or not isinstance(number, int) or number < 0:
        return f"gives the token {shown(token, 60)} the id {shown(number, 40)}, which is none"
    if number >= vocab_size:
        return (
            f"gives the token {shown(token, 60)} the id {shown(number, 40)}, and the model's vocabulary ends with "
            f"{vocab_size - 1}: config.json has vocab_size {vocab_size}"
        )
    return None


def _merge_problem(merge: Any, tokens: set[str]) -> str | None:
    parts = merge.split(" ", 1) if isinstance(merge, str) else merge
    if (
        not isinstance(parts, list)
        or len(parts) != 2
        or not all(isinstance(part, str) and part in tokens for part in parts)
        or "".join(parts) not in tokens
    ):
        return f"merges {shown(merge, 80)}, of which a part or the whole is no token of its vocabulary"
    return None
