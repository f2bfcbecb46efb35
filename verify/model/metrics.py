"""Distances between a model and its quantised self: cosine, signal to noise, and KL divergence. All sums are in f64.

Pure functions on arrays and one accumulator; depends on numpy and torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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


TOP = 8
"""How many of the most likely tokens of both models are compared, besides the first."""


FEWEST = 512
"""Positions under which no quality is judged unless that is asked for."""


@dataclass(frozen=True)
class LayerFigures:
    """One layer of a model beside the source's: cosine of the residual stream over positions, the squared error of the
    stream as a share of its energy, and the share of routed experts that both chose.
    """

    layer: int
    cosine_mean: float
    cosine_min: float
    error: float
    routing: float


def layer_figures(
    layer: int, reference: Tensor, test: Tensor, theirs: Tensor | None, ours: Tensor | None
) -> LayerFigures:
    """Compare residual streams [n_seq, len, H], one sequence at a time, and routed ids [n_seq · len, k].

    Without ids nothing is known of the routing, which is NaN then.
    """
    cosines, error, energy = [], 0.0, 0.0
    for a, b in zip(reference, test, strict=True):
        a, b = a.double(), b.double()
        cosines.append(cosine(a, b))
        error += float((a - b).square().sum())
        energy += float(a.square().sum())
    of_all = np.concatenate(cosines)
    share = float("nan")
    if theirs is not None and ours is not None:
        share = float((theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean())
    relative = error / energy if energy else float(error > 0)
    return LayerFigures(layer, float(of_all.mean()), float(of_all.min()), relative, share)


@dataclass(frozen=True)
class DivergenceSummary:
    """KLD over positions (nats), agreement of the most likely tokens, and both perplexities.

    `top1` is the share of positions with the same most likely token, `top8` the mean share of the TOP most likely
    tokens that both models have. Errors are standard errors of the mean, and of a perplexity that follows from a mean.
    Perplexities are over the positions whose next token is known; NaN where there is none, as an error of one value.
    """

    positions: int
    kld_mean: float
    kld_error: float
    kld_median: float
    kld_p95: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1: float
    top8: float
    ppl_reference: float
    ppl_reference_error: float
    ppl_test: float
    ppl_test_error: float


@dataclass(frozen=True)
class Positions:
    """What was found at each scored position, in order: KLD f64 [n], whether the most likely token is the same bool
    [n], the share of the TOP most likely ones that both have f64 [n]; and −ln of the probability that each model gives
    to the next token, f64 [m], where that is known.
    """

    kld: F64
    top1: NDArray[np.bool_]
    top8: F64
    nll_reference: F64
    nll_test: F64

    def summary(self) -> DivergenceSummary:
        """CheckError where there is no position."""
        if not self.kld.size:
            raise CheckError("no position was scored", hint="give at least one token")
        median, p95, p99, p999 = np.quantile(self.kld, [0.5, 0.95, 0.99, 0.999]).tolist()
        return DivergenceSummary(
            len(self.kld),
            float(self.kld.mean()),
            standard_error(self.kld),
            median,
            p95,
            p99,
            p999,
            float(self.kld.max()),
            float(self.top1.mean()),
            float(self.top8.mean()),
            *perplexity(self.nll_reference),
            *perplexity(self.nll_test),
        )


def standard_error(values: F64) -> float:
    """The standard error of the mean of values f64 [n]; NaN for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def perplexity(nll: F64) -> tuple[float, float]:
    """exp of the mean of −ln p f64 [n], and its standard error; NaN where nothing is known."""
    value = float(np.exp(nll.mean())) if nll.size else float("nan")
    return value, value * standard_error(nll)


@dataclass
class Divergence:
    """Collects next-token logits of a reference and a test model, one sequence at a time.

    It holds logits over the whole vocabulary; `evaluate.head` gives the same of a part of the vocabulary at a time.
    """

    found: list[Positions] = field(default_factory=list)

    def add(self, reference: Tensor, test: Tensor, tokens: NDArray[np.integer]) -> None:
        """Logits [len, vocab] of both models for one sequence of token ids [len]."""
        following = torch.from_numpy(np.asarray(tokens[1:], np.int64))[:, None]
        nlls = [
            -values[:-1].double().log_softmax(-1).gather(1, following)[:, 0].numpy()
            for values in (reference, test)
        ]
        count = min(TOP, reference.shape[-1])
        tops = [values.topk(count).indices for values in (reference, test)]
        self.found.append(
            Positions(
                kl_divergence(reference, test),
                (reference.argmax(-1) == test.argmax(-1)).numpy(),
                shared(*tops),
                *nlls,
            )
        )

    def values(self) -> F64:
        """Every position's KLD, in the order in which they were added."""
        return joined(self.found).kld

    def summary(self) -> DivergenceSummary:
        return joined(self.found).summary()


def joined(found: Sequence[Positions]) -> Positions:
    """The positions of several texts, one after the other."""
    if not found:
        empty = np.empty(0)
        return Positions(empty, np.empty(0, np.bool_), empty, empty, empty)
    arrays: list[Any] = [np.concatenate([getattr(part, f.name) for part in found]) for f in fields(Positions)]
    return Positions(*arrays)


def shared(theirs: Tensor, ours: Tensor) -> F64:
    """The share of token ids i64 [n, k] that stand in both rows, f64 [n]."""
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean(-1).numpy()
