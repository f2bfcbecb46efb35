"""A matrix that is being encoded on a device, and what is kept of it under a dense H."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...formats.blocks import LloydFormat
from ...lloyd.constants import GROUP
from ...lloyd.group_fit import Rotated
from ..runtime.host import Buffer
from .space import Space


@dataclass(frozen=True)
class Work:
    """What is under way: rotated rows f32 [count, 256·groups], params f32, codes u8. These are one matrix, or `beside`
    matrices side by side, the first group of each, then the second group of each, and so on.
    """

    fmt: Rotated
    count: int
    groups: int
    rows: Buffer
    params: Buffer
    codes: Buffer
    beside: int = 1

    @property
    def own(self) -> int:
        """The groups of one matrix."""
        return self.groups // self.beside

    def part(self, rows: slice) -> Work:
        """Some rows of it, in the same memory."""
        start, stop = rows.start, rows.stop
        return replace(
            self,
            count=stop - start,
            rows=self.rows.rows(start, stop),
            params=self.params.rows(start, stop),
            codes=self.codes.rows(start, stop),
        )

    def blocks(self, rows: int) -> int:
        """Blocks of so many rows."""
        return -(-self.count // rows)


@dataclass(frozen=True)
class Dense:
    """What is kept of groups under a dense H, f32 [count, 256·groups]: `pulled`, H · rows; the pull that descent has
    `left`; and for a grid sums over rows of H, those of a codebook f32 [groups of a launch, count, K, 256]. They are of
    the codes u8 `before`.
    """

    pulled: Buffer
    left: Buffer
    sums: Buffer
    before: Buffer


def kept_of(space: Space, work: Work, number: int) -> Dense:
    """What is kept of so many groups."""
    sums = work.rows.shape
    if isinstance(work.fmt, LloydFormat):
        sums = (number, work.count, work.fmt.levels, GROUP)
    return Dense(
        space.take("pulled", work.rows.shape, np.float32),
        space.take("left over", work.rows.shape, np.float32),
        space.take("sums", sums, np.float32),
        space.take("before", work.codes.shape, np.uint8),
    )
