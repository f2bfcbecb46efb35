"""The files that llama.cpp's `llama-perplexity --kl-divergence-base` writes, as a reference.

With them a file's KLD is the number that llama.cpp would print, and can stand beside those of GGUF publishers. A file
holds "_logits_", i32 n_ctx, n_vocab and n_chunk, the token ids i32 [n_chunk, n_ctx], and for each chunk a row for each
position from n_ctx / 2 to the last but one: a scale and a minimum f32, then a code u16 for each token of the vocabulary
(one more where their number is odd). ln p = minimum + scale · code.

llama.cpp's sums are taken as they are: tokens with ln p of −16 and less count for nothing, and what is left of p is not
normalised again. Where its tokenizer puts a BOS in front of a text, it puts one in place of each chunk's first token.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.errors import InputError
from ...formats.unchanged import UnchangedFile
from .dense import DenseComparison, Sums

MAGIC = b"_logits_"
HEAD = struct.Struct("<8siii")
CODES = 8
"""The byte of a row at which its codes begin."""
LONGEST = 1 << 24
HINT = "make it with llama-perplexity --kl-divergence-base FILE, of this model and whole"
AS_LLAMA = Sums(lambda mean, a, b: a.exp() * (mean + b), lambda total, target: -target, floor=-16.0)


@dataclass
class LlamaBase:
    """An open file: `tokens` i32 [n_chunk, n_ctx] as they are, `ranges` f32 [n_chunk, rows, 2] of scale and minimum."""

    file: UnchangedFile
    vocabulary: int
    tokens: NDArray[np.int32]
    ranges: NDArray[np.float32]

    @property
    def scored(self) -> range:
        """The positions of a chunk that are judged."""
        length = self.tokens.shape[1]
        return range(length // 2, length - 1)

    def begun_with(self, bos: int | None) -> NDArray[np.int32]:
        """The tokens that the model is run on: with a BOS before each chunk where the text begins with one."""
        tokens = self.tokens.copy()
        if bos is not None and tokens[0, 0] == bos:
            tokens[:, 0] = bos
        return tokens

    def comparison(self, models: int) -> DenseComparison:
        """How models are compared with it."""
        return DenseComparison(self, self.tokens, self.vocabulary, models, self.scored, AS_LLAMA)

    def load(self, low: int, high: int) -> None:
        self._low, self._high = low, high

    def logits(self, sequence: int, scored: range) -> Tensor:
        """ln p f64 [positions, rows] of the part that was loaded."""
        size, count = row_bytes(self.vocabulary), self._high - self._low
        start = _first(self.tokens) + sequence * len(scored) * size + CODES + 2 * self._low

        def read(f: BufferedReader) -> NDArray[np.uint16]:
            out = np.empty((len(scored), count), "<u2")
            for i, row in enumerate(out):
                f.seek(start + i * size)
                if f.readinto(row.view(np.uint8)) != row.nbytes:  # type: ignore[arg-type]
                    raise InputError("ends before its last prediction", file=self.file.path, hint=HINT)
            return out

        scale, minimum = self.ranges[sequence, :, :1], self.ranges[sequence, :, 1:]
        return torch.from_numpy(
            (scale * self.file.read(read).astype(np.float32) + minimum).astype(np.float64)
        )


def row_bytes(vocabulary: int) -> int:
    """Bytes of one position: scale, minimum, and an even number of codes."""
    return CODES + 4 * ((vocabulary + 1) // 2)


def _first(tokens: NDArray[np.int32]) -> int:
    return HEAD.size + 4 * tokens.size


def open_llama_base(path: Path) -> LlamaBase:
    """A file of llama.cpp's; InputError where it is none, or not whole."""
    file = UnchangedFile(path, InputError, HINT)

    def refuse(problem: str) -> InputError:
        return InputError(f"is no file of llama.cpp's --kl-divergence-base: {problem}", file=path, hint=HINT)

    head = file.read(lambda f: f.read(HEAD.size))
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise refuse("it does not begin with _logits_")
    _, length, vocabulary, chunks = HEAD.unpack(head)
    if min(length, vocabulary, chunks) < 1 or max(length, vocabulary) > LONGEST or length < 4:
        raise refuse(f"it states n_ctx {length}, n_vocab {vocabulary} and n_chunk {chunks}")
    rows, size = length - 1 - length // 2, row_bytes(vocabulary)
    needed = HEAD.size + 4 * length * chunks + chunks * rows * size
    if file.size != needed:
        raise refuse(f"it has {file.size} bytes, and what it states takes {needed}")

    def read(f: BufferedReader) -> tuple[bytes, bytes]:
        f.seek(HEAD.size)
        tokens, ranges = f.read(4 * length * chunks), bytearray()
        for row in range(chunks * rows):
            f.seek(HEAD.size + len(tokens) + row * size)
            ranges += f.read(CODES)
        return tokens, bytes(ranges)

    raw, stated = file.read(read)
    tokens = np.frombuffer(raw, "<i4").reshape(chunks, length).astype(np.int32)
    ranges = np.frombuffer(stated, "<f4").reshape(chunks, rows, 2).astype(np.float32)
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise refuse("it holds token ids outside its vocabulary")
    scale, minimum = ranges[..., 0], ranges[..., 1]
    if not np.isfinite(ranges).all() or scale.min() < 0 or scale.max() > 1 or minimum.max() > math.log(2):
        raise refuse("its log-probabilities are none")
    return LlamaBase(file, vocabulary, tokens, ranges)
