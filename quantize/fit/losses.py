"""What each piece loses in each format, measured on this model or typical of others, and the KLD that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .allocation import Allocation
from .measurement import Measurement, whole_formats

DOUBT, REST_DOUBT = 0.03, 0.25
"""What of a difference between sums of measured pieces means nothing: a share of the sum, and a share of what the rest
of the file loses, in which the smallest losses drown. On two small trained models no smaller ones hold (docs/fit.md).
"""


@dataclass(frozen=True)
class Losses:
    """`pieces` holds the loss by the name of the format, in the order of a measurement.

    `origin` says in words where the numbers come from. `known` are sums of losses of whole models with the KLD that was
    measured of each; without any, the losses are only relative and no KLD is expected. A difference means nothing
    that is smaller than the share `doubt` of a sum and the part REST_DOUBT of the rest. `effort` is how pieces were
    rounded when they were measured.
    """

    pieces: tuple[Mapping[str, float], ...]
    origin: str
    rest: float = 0.0
    known: tuple[tuple[float, float], ...] = ()
    doubt: float = 0.0
    effort: Literal["imatrix", "calibrated"] | None = None

    def total(self, allocation: Allocation) -> float:
        """The sum over all pieces."""
        chosen = zip(self.pieces, allocation.pieces(), strict=True)
        return sum(losses[name] for losses, (_, _, name) in chosen)

    def clearly_less(self, allocation: Allocation, other: Allocation) -> bool:
        """Whether an allocation loses so much less than another one that it shows in whole files."""
        before = self.total(other)
        return before - self.total(allocation) > self.doubt * before + REST_DOUBT * self.rest

    def expected(self, allocation: Allocation) -> float | None:
        """The KLD of a file with this allocation; None where nothing whole was measured.

        Errors of pieces add up nearly: between models that were measured whole, the logarithm of their KLD is
        interpolated over that of their sums, and outside the ratio of the nearest one holds.
        """
        points = sorted((s, kld - self.rest) for s, kld in self.known if s > 0 and kld > self.rest)
        if not points:
            return None
        total = self.total(allocation)
        if total <= 0:
            return self.rest
        sums, klds = np.log(np.array(points).T)
        at = np.log(total)
        inside = np.interp(at, sums, np.maximum.accumulate(klds))
        beyond = max(at - sums[-1], 0.0) + min(at - sums[0], 0.0)
        return self.rest + float(np.exp(inside + beyond))


def measured(measurement: Measurement) -> Losses:
    """The losses of a measurement."""
    pieces = tuple(
        {name: measurement.loss(piece.layer, piece.projection, name) for name in measurement.formats}
        for piece in measurement.pieces
    )
    name, effort, tokens = measurement.model.name, measurement.effort, measurement.text.tokens
    origin = f"losses measured on {name} at effort {effort}, on {tokens} tokens"
    alone = Losses(pieces, origin)
    layers = measurement.model.layers
    known = tuple(
        (alone.total(Allocation((whole_formats(name),) * layers)), kld)
        for name, kld in measurement.whole.items()
    )
    return Losses(pieces, origin, measurement.rest, known, DOUBT, effort)
