"""What is known of a model's next-token distributions while its logits come, some rows of the vocabulary at a time.

Logits of all positions over a vocabulary of 200,000 do not fit into memory. Everything that is asked of them is a sum
or a maximum over the vocabulary, so each part is taken up and forgotten. All sums are in f64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Running:
    """One sequence's positions: `total` f64 [n] is the logarithm of the sum of exp(logit), `first` i64 [n] the most
    likely token (of equals the lowest id), `ids` i64 [n, kept] the most likely ones, best first, and `target` f64 [m]
    the logits of the tokens that follow. Logits of `floor` and below count for nothing in the sum.
    """

    following: Tensor
    positions: int
    kept: int
    floor: float = -math.inf
    total: Tensor = field(init=False)
    first: Tensor = field(init=False)
    ids: Tensor = field(init=False)
    target: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n = self.positions
        self.total = torch.full((n,), -torch.inf, dtype=torch.float64)
        self.first = torch.zeros(n, dtype=torch.int64)
        self._best = torch.full((n,), -torch.inf, dtype=torch.float64)
        self.ids = torch.empty(n, 0, dtype=torch.int64)
        self._logits = torch.empty(n, 0, dtype=torch.float64)
        self.target = torch.full((len(self.following),), torch.nan, dtype=torch.float64)

    def take(self, low: int, block: Tensor) -> None:
        """The logits f64 [n, rows] of the vocabulary's rows from `low` on."""
        rows = block.shape[1]
        counted = torch.where(block <= self.floor, -torch.inf, block)
        self.total = torch.logaddexp(self.total, counted.logsumexp(-1))
        best, at = block.max(-1)
        better = best > self._best
        self.first = torch.where(better, at + low, self.first)
        self._best = torch.where(better, best, self._best)
        top = block.topk(min(self.kept, rows), -1)
        known, ids = torch.cat([self._logits, top.values], 1), torch.cat([self.ids, top.indices + low], 1)
        best_known = known.topk(min(self.kept, known.shape[1]), -1)
        self._logits, self.ids = best_known.values, ids.gather(1, best_known.indices)
        local = self.following - low
        here = (local >= 0) & (local < rows)
        found = block[: len(local)].gather(1, local.clamp(0, rows - 1)[:, None])[:, 0]
        self.target = torch.where(here, found, self.target)
