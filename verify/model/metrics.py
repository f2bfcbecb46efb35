"""Distances between a model and its quantised self: cosine, signal to noise, and KL divergence. All sums are in f64.

Pure functions on arrays and one accumulator; depends on numpy and torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.errors import CheckError

F64 = NDArray[np.float64]
DB_CEILING = 200.0
"""Signal to noise is capped here (dB), so that exact equality stays a number in JSON."""


def cosine(a: Tensor, b: Tensor) -> F64:
    """Cosine of corresponding rows of [..., n], f64 [...]; 1 where both rows are zero, 0 where one is."""
    x, y = a.double(), b.double()
    product = (x * y).sum(-1)
    norms = x.square().sum(-1).sqrt() * y.square().sum(-1).sqrt()
    both_zero = (x == 0).all(-1) & (y == 0).all(-1)
    out = torch.where(norms == 0, both_zero.double(), product / torch.where(norms == 0, 1.0, norms))
    return out.numpy()


def snr_db(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two energies, within ±DB_CEILING; NaN where an energy is not a number."""
    if noise == 0 or signal == 0:
        return DB_CEILING if noise == 0 else -DB_CEILING
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.clip(10 * np.log10(signal / noise), -DB_CEILING, DB_CEILING))


def kl_divergence(reference: Tensor, test: Tensor) -> F64:
    """Σ p·(ln p − ln q) over the last axis of logits [n, vocab], in f64 log-softmax: f64 [n], never below 0."""
    p, q = reference.double().log_softmax(-1), test.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0).numpy()


@dataclass(frozen=True)
class DivergenceSummary:
    """KLD over positions (nats), the share of positions with the same most likely token, and both perplexities.

    Perplexities are over the positions whose next token is known; NaN where there is none.
    """

    positions: int
    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_max: float
    top1: float
    ppl_reference: float
    ppl_test: float


@dataclass
class Divergence:
    """Collects next-token logits of a reference and a test model, one sequence at a time."""

    klds: list[F64] = field(default_factory=list)
    agree: list[NDArray[Any]] = field(default_factory=list)
    nll_reference: list[F64] = field(default_factory=list)
    nll_test: list[F64] = field(default_factory=list)

    def add(self, reference: Tensor, test: Tensor, tokens: NDArray[np.integer]) -> None:
        """Logits [len, vocab] of both models for one sequence of token ids [len]."""
        self.klds.append(kl_divergence(reference, test))
        self.agree.append((reference.argmax(-1) == test.argmax(-1)).numpy())
        following = torch.from_numpy(np.asarray(tokens[1:], np.int64))[:, None]
        for logits, nll in ((reference, self.nll_reference), (test, self.nll_test)):
            nll.append(-logits[:-1].double().log_softmax(-1).gather(1, following)[:, 0].numpy())

    def values(self) -> F64:
        """Every position's KLD, in the order in which they were added; CheckError where there is none."""
        if not sum(map(len, self.klds)):
            raise CheckError("no position was scored", hint="give at least one token")
        return np.concatenate(self.klds)

    def summary(self) -> DivergenceSummary:
        values = self.values()
        return DivergenceSummary(
            positions=len(values),
            kld_mean=float(values.mean()),
            kld_median=float(np.median(values)),
            kld_p99=float(np.quantile(values, 0.99)),
            kld_max=float(values.max()),
            top1=float(np.concatenate(self.agree).mean()),
            ppl_reference=_perplexity(self.nll_reference),
            ppl_test=_perplexity(self.nll_test),
        )


def _perplexity(nll: list[F64]) -> float:
    values = np.concatenate(nll)
    return float(np.exp(values.mean())) if values.size else float("nan")
