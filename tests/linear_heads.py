"""Models that are nothing but a head: final hidden states that are given, and a matrix of a small vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from mq_quant.verify.evaluate.head import Head
from torch import Tensor

VOCABULARY, WIDTH = 97, 8


@dataclass
class Linear:
    """A model of which only the head is asked."""

    rows: Tensor

    def head(self, low: int, high: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden @ self.rows[low:high].T


def heads(noise: float = 0.3, scale: float = 1.0) -> tuple[Head, Head, np.ndarray]:
    """A reference, a model near it, and tokens [3, 11]."""
    random = torch.Generator().manual_seed(0)
    rows = scale * torch.randn(VOCABULARY, WIDTH, generator=random, dtype=torch.float64)
    near = rows + noise * torch.randn(VOCABULARY, WIDTH, generator=random, dtype=torch.float64)
    hidden = torch.randn(3, 11, WIDTH, generator=random, dtype=torch.float64)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, 11))
    return Head(Linear(rows), hidden), Head(Linear(near), hidden), tokens  # type: ignore[arg-type]
