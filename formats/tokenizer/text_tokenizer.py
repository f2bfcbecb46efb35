"""A tokenizer.json as plain text needs it: nothing is cut off, nothing is padded, nothing is left to chance.

The file often still holds the settings of a training run: truncation, padding, dropout. They are switched off here. The
tokenizers package reports faults of a file as plain exceptions, and some as panics of its Rust code; all of them become
a TokenError that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import TokenError
from ..lfs import HINT, PROBLEM, is_pointer
from ..plain_file import open_plain
from ..text import shown

SIZE_LIMIT = 256 << 20
"""Bytes of a tokenizer.json; those of large vocabularies have about 30 MB."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text: `ids` u32 [n], and of each token where it starts in the text and to which word it belongs.

    A word (`words` i64 [n], -1 for special tokens) is what the tokenizer splits a text into before it makes tokens of
    it, each word by itself. `starts` i64 [n] counts characters.
    """

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    words: NDArray[np.int64]


class TextTokenizer:
    """The tokenizer that `text`, the content of a tokenizer.json, describes; `file` is named in errors (TokenError)."""

    def __init__(self, text: str, file: str | Path) -> None:
        from tokenizers import Tokenizer

        self.file = file
        with self._faults("cannot be read"):
            self._tokenizer = Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if getattr(self._tokenizer.model, "dropout", None) is not None:
                self._tokenizer.model.dropout = None

    @classmethod
    def open(cls, path: Path) -> TextTokenizer:
        """The tokenizer in a file; TokenError."""
        try:
            with open_plain(path) as f:
                raw = f.read(SIZE_LIMIT + 1)
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            said = getattr(e, "strerror", None) or e
            raise TokenError(f"the tokenizer cannot be read: {said}", file=path) from None
        if len(raw) > SIZE_LIMIT:
            raise TokenError(f"the tokenizer is larger than {SIZE_LIMIT} bytes", file=path)
        if is_pointer(raw):
            raise TokenError(PROBLEM, file=path, hint=HINT)
        return cls(text, path)

    def split_by(self, pattern: str) -> TextTokenizer:
        """A tokenizer that differs in how it splits a text into words: by this pattern, and into bytes after that."""
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        with self._faults("cannot be copied"):
            other = TextTokenizer(self._tokenizer.to_str(), self.file)
            words = Split(Regex(pattern), behavior="isolated")
            byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
            other._tokenizer.pre_tokenizer = Sequence([words, byte_level])
            return other

    def ids(self, text: str, special: bool) -> list[int]:
        """The ids of a text, with `special` including what the tokenizer puts around every text, such as BOS."""
        with self._faults("cannot encode the text"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
            return ids

    def encode(self, text: str) -> Encoded:
        """The tokens of a text, without any that the tokenizer puts around it."""
        with self._faults("cannot encode the text"):
            found = self._tokenizer.encode(text, add_special_tokens=False)
            words = [-1 if word is None else word for word in found.word_ids]
            starts = np.array([start for start, _ in found.offsets], np.int64)
            return Encoded(np.array(found.ids, np.uint32), starts, np.array(words, np.int64))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        with self._faults("cannot decode the tokens"):
            return str(self._tokenizer.decode(list(ids)))

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            with _without_panic_messages():
                yield
        except BaseException as e:  # a panic of Rust code is no Exception
            if isinstance(e, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
                raise
            raise TokenError(f"the tokenizer {what}: {shown(str(e), 200)}", file=self.file) from None


@contextmanager
def _without_panic_messages() -> Iterator[None]:
    """Drop what Rust writes to file descriptor 2, a panic and its stack, before it is raised as an exception."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
