"""Which token goes where: the choices of a router laid out so that several experts are computed at once.

Experts are taken in blocks, those with most tokens first. All experts of a block have as many places as the first of
them has tokens, and more than half as many tokens. Places that are left over hold some token, and what is computed
there is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Experts that are computed at once, and the places of each."""

    experts: tuple[int, ...]
    places: int

    @property
    def rows(self) -> int:
        """The places of all of them."""
        return len(self.experts) * self.places


@dataclass(frozen=True)
class Placement:
    """Where each of n · k choices is computed, block by block.

    `order` i64 [experts] is that of the experts in the blocks, followed by those that no token takes. `place` i64 [n·k]
    is each choice's row among all places, `choice` i64 [places] the choice that each place holds, and `used` bool
    [places] tells places that hold one from those left over.
    """

    blocks: tuple[Block, ...]
    order: Tensor
    place: Tensor
    choice: Tensor
    used: Tensor

    @classmethod
    def of(cls, ids: Tensor, experts: int, together: int) -> Placement:
        """Lay out the choices i64 [n, k] among so many experts, up to `together` in one block."""
        chosen = ids.flatten().cpu().numpy()
        counts = np.bincount(chosen, minlength=experts)
        order = np.argsort(-counts, kind="stable")
        taken = order[: np.count_nonzero(counts)]
        parts = _divided(counts[taken].tolist(), together)
        blocks = tuple(Block(tuple(taken[part].tolist()), int(counts[taken[part.start]])) for part in parts)
        place = _places(chosen, counts, blocks)
        total = sum(block.rows for block in blocks)
        choice, used = np.zeros(total, np.int64), np.zeros(total, np.bool_)
        choice[place], used[place] = np.arange(len(chosen)), True
        return cls(blocks, *(torch.from_numpy(each).to(ids.device) for each in (order, place, choice, used)))

    def rows_and_experts(self) -> tuple[list[int], list[int]]:
        """The places of each block, and its experts; behind these, the number of experts that no token takes."""
        sizes = [len(block.experts) for block in self.blocks]
        return [block.rows for block in self.blocks], [*sizes, len(self.order) - sum(sizes)]


def _divided(counts: list[int], together: int) -> Iterator[slice]:
    """Blocks of experts whose tokens, in descending order, are so many, up to `together` in one."""
    first = 0
    for n in range(1, len(counts) + 1):
        if n == len(counts) or n - first == together or 2 * counts[n] <= counts[first]:
            yield slice(first, n)
            first = n


def _places(
    chosen: NDArray[np.int64], counts: NDArray[np.int64], blocks: tuple[Block, ...]
) -> NDArray[np.int64]:
    """Each choice's place: an expert's choices follow each other in the order in which they come."""
    begin, at = np.zeros(len(counts), np.int64), 0
    for block in blocks:
        for e in block.experts:
            begin[e] = at
            at += block.places
    order = np.argsort(chosen, kind="stable")
    first = np.cumsum(counts) - counts
    out = np.empty(len(chosen), np.int64)
    out[order] = begin[chosen[order]] + np.arange(len(chosen)) - first[chosen[order]]
    return out
