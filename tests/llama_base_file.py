"""Files of llama.cpp's --kl-divergence-base, written as llama.cpp writes them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from linear_heads import VOCABULARY, heads

LENGTH = 11
ROWS = LENGTH - 1 - LENGTH // 2


def logits_of(model: object, sequence: int) -> np.ndarray:
    model.load(0, VOCABULARY)  # type: ignore[attr-defined]
    values: np.ndarray = model.logits(sequence, range(LENGTH)).numpy().astype(np.float32)  # type: ignore[attr-defined]
    return values


def coded(logits: np.ndarray) -> bytes:
    """One position as `log_softmax` of tools/perplexity writes it: scale, minimum and an even number of codes."""
    top, low = logits.max(), max(logits.min(), logits.max() - np.float32(16))
    log_sum = np.float32(np.log(np.exp(logits - top).astype(np.float64).sum()))
    scale = (top - low) / np.float32(65535)
    codes = np.where(logits > low, np.rint((logits - low) / scale), 0).astype("<u2")
    return struct.pack("<ff", scale, low - top - log_sum) + codes.tobytes() + b"\0\0" * (codes.size % 2)


def written(path: Path, scale: float) -> tuple[Path, object, np.ndarray]:
    """The reference's predictions in llama.cpp's form, a model near it, and the tokens."""
    reference, test, tokens = heads(scale=scale)
    out = bytearray(struct.pack("<8siii", b"_logits_", LENGTH, VOCABULARY, len(tokens)))
    out += tokens.astype("<i4").tobytes()
    for s in range(len(tokens)):
        values = logits_of(reference, s)
        for at in range(LENGTH // 2, LENGTH - 1):
            out += coded(values[at])
    path.write_bytes(out)
    return path, test, tokens
