"""A text as token ids, in memory that does not grow with the text.

The text is read and tokenised in windows. Two windows that follow each other overlap, and are joined at the beginning
of a word around which both have the same tokens, for thousands of characters on either side. A tokenizer goes through
a text from left to right and decides by what lies near, and each window sees what lies near that place, so the joined
tokens are those of the whole text. Where two windows have no such place, they become one, in the worst case all of the
text.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import TokenError
from ...formats.tokenizer import TextTokenizer

WINDOW = 1 << 18
"""Characters that are tokenised at a time. What the tokenizer knows of their tokens takes up to 100 MB."""
OVERLAP = 1 << 13
"""Characters before the place of joining that two windows share, and at least that many after it."""
WINDOW_LIMIT = 1 << 25
"""Characters of a window that could be joined nowhere, above which the text is refused."""
PIECE = 1 << 16
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Ids = NDArray[np.uint32]


def text_tokens(
    source: Path | str, tokenizer: TextTokenizer, window: int = WINDOW, overlap: int = OVERLAP
) -> Generator[Ids]:
    """The token ids u32 of a text, some at a time; no token is put around the text.

    `source` is the text itself, or the path of its file. That is UTF-8, with or without a byte order mark; line ends of
    Windows and old Macs are read as "\\n". Raises TokenError where it is not, and where it cannot be tokenised.
    """
    path = source if isinstance(source, Path) else None
    with closing(_Text(source)) as text:
        here = _Window(tokenizer, 0, text.read(window))
        while not text.ended:
            more = text.read(window)
            place = here.place(overlap)
            if place is not None:
                start = int(here.starts[place]) - overlap
                there = _Window(tokenizer, start, here.text[start - here.start :] + more)
                same = there.place_of(here, place, overlap // 2)
                if same is not None:
                    yield here.ids[here.done : place]
                    there.done = same
                    here = there
                    continue
            longer = here.text + more + text.read(len(here.text))
            if len(longer) > WINDOW_LIMIT:
                raise TokenError(
                    f"cannot be tokenised in parts: the tokens of the {len(longer)} characters from character "
                    f"{here.start} on all depend on each other",
                    file=path,
                    hint="give a text that consists of words",
                )
            here = _Window(tokenizer, here.start, longer, here.done)
        yield here.ids[here.done :]


class _Window:
    """A part of a text with its tokens; `starts` i64 count from the beginning of the text, as `start` does.

    Tokens before index `done` were handed out already.
    """

    def __init__(self, tokenizer: TextTokenizer, start: int, text: str, done: int = 0) -> None:
        found = tokenizer.encode(text)
        self.start, self.text, self.done = start, text, done
        self.ids, self.starts, self._words = found.ids, found.starts + start, found.words

    def place(self, overlap: int) -> int | None:
        """The last token at which the next window may be joined: it lies `overlap` or more from both ends.

        It begins a word, or, where the tokenizer takes the text for one word, at least a character.
        """
        low = self.start + overlap
        if self.done < len(self.starts):
            low = max(low, int(self.starts[self.done]) + 1)
        high = self.start + len(self.text) - overlap
        inside = (self.starts[1:] >= low) & (self.starts[1:] <= high)
        fresh = inside & (self.starts[1:] > self.starts[:-1])
        for candidates in (fresh & (self._words[1:] != self._words[:-1]), fresh):
            found = np.flatnonzero(candidates)
            if found.size:
                return int(found[-1]) + 1
        return None

    def place_of(self, other: _Window, place: int, near: int) -> int | None:
        """The index of the other window's token `place` here, or None where the tokens near it are not the same."""
        at = int(other.starts[place])
        mine, theirs = (w._around(at, near) for w in (self, other))
        same = np.array_equal(self.starts[mine], other.starts[theirs]) and np.array_equal(
            self.ids[mine], other.ids[theirs]
        )
        return mine.start + place - theirs.start if same else None

    def _around(self, at: int, near: int) -> slice:
        """The tokens that start less than `near` characters from `at`."""
        low, high = np.searchsorted(self.starts, [at - near, at + near])
        return slice(int(low), int(high))


class _Text:
    """A text or a text file that is read once, from its beginning."""

    def __init__(self, source: Path | str) -> None:
        self.path = source if isinstance(source, Path) else None
        self._offset = 0
        self._exhausted = False
        self._left = ""
        self._decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        try:
            if isinstance(source, Path) and source.is_char_device() and not source.samefile(os.devnull):
                raise TokenError("is a device, not a text", file=source)  # most of them have no end
            self._file: BinaryIO = (
                source.open("rb") if isinstance(source, Path) else io.BytesIO(source.encode())
            )
        except OSError as e:
            raise self._unreadable(e) from None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to read."""
        return self._exhausted and not self._left

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, count: int) -> str:
        """The next `count` characters, fewer only at the end; TokenError where they are not UTF-8."""
        parts, length = [self._left], len(self._left)
        while length <= count and not self._exhausted:
            parts.append(self._decode())
            length += len(parts[-1])
        text = "".join(parts)
        self._left = text[count:]
        return text[:count]

    def _decode(self) -> str:
        try:
            raw = self._file.read(PIECE)
        except OSError as e:
            raise self._unreadable(e) from None
        if self._offset == 0:
            if raw.startswith(_WIDE):
                raise TokenError("is UTF-16 text", file=self.path, hint="save it as UTF-8")
            if raw.startswith(codecs.BOM_UTF8):
                raw, self._offset = raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        begin = self._offset - len(self._decoder.getstate()[0])
        self._offset += len(raw)
        self._exhausted = not raw
        try:
            return self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as e:
            raise TokenError(
                f"is not UTF-8 text: {e.reason} at byte {begin + e.start}",
                file=self.path,
                hint="save it as UTF-8",
            ) from None

    def _unreadable(self, e: OSError) -> TokenError:
        return TokenError(f"cannot be read as text: {e.strerror}", file=self.path)
