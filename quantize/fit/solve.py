"""The best formats for so many bytes: exact, by dynamic programming over what every piece may cost.

A piece takes one of a few formats; each costs bytes and a loss, and losses add up. For every number of bytes that the
pieces so far can take, the least loss is kept. All costs are multiples of a common step, so nothing is rounded and the
result is the minimum, not near it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...formats.errors import BudgetError

MAX_CELLS = 1 << 26
"""Bytes-in-steps times pieces that are computed; those of M2.7 are 0.6 million."""


@dataclass(frozen=True)
class Choice:
    """One format that a piece may take."""

    name: str
    nbytes: int
    loss: float


def solve(pieces: Sequence[Sequence[Choice]], limit: int) -> tuple[Choice, ...]:
    """The choice for each piece with the least sum of losses in at most `limit` bytes; of equal sums that of the fewest
    bytes, of those the one whose first pieces take the formats that are named first.

    Raises BudgetError where even the smallest choices take more.
    """
    smallest = sum(min(choice.nbytes for choice in choices) for choices in pieces)
    if smallest > limit:
        raise BudgetError(f"the smallest formats take {smallest} bytes, more than {limit}")
    step = math.gcd(*(choice.nbytes for choices in pieces for choice in choices)) or 1
    largest = sum(max(choice.nbytes for choice in choices) for choices in pieces)
    width = min(limit, largest) // step + 1
    if width * len(pieces) > MAX_CELLS:
        raise BudgetError(
            "the sizes of this model's pieces have no common step, so they cannot be allocated exactly"
        )
    least = np.full(width, np.inf)
    least[0] = 0.0
    taken: list[np.ndarray] = []
    for choices in reversed(pieces):
        after = np.full(width, np.inf)
        which = np.zeros(width, np.uint8)
        for i, choice in enumerate(choices):
            cost = choice.nbytes // step
            if cost >= width:
                continue
            total = least[: width - cost] + choice.loss
            better = total < after[cost:]
            after[cost:][better] = total[better]
            which[cost:][better] = i
        least = after
        taken.append(which)
    left = int(np.argmin(least))
    out = []
    for choices, which in zip(pieces, reversed(taken), strict=True):
        choice = choices[which[left]]
        out.append(choice)
        left -= choice.nbytes // step
    return tuple(out)
