"""Rows that answer each other: a matrix is rounded in blocks of rows, each toward a target that answers the errors of
the blocks before it. `awq.row_answers` finds how.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..formats.blocks import Format
from .constants import GROUP
from .encode import Fit, encode_rotated
from .group_fit import F32, U8
from .hessian.row import RowHessian
from .loops import compiled
from .simd.lanes import PANEL, block_of, lined_up_room, product
from .simd.vec import LANES

RowAnswers = Sequence[tuple[slice, F32]]
"""For each block its rows, and the share f32 [rows, before] of the errors of all rows before that is added to their
target.
"""


def encode_blocks(
    rows: F32, answers: RowAnswers, fmt: Format, fit: Fit, hessian: RowHessian | None, gain: float
) -> U8:
    """As `encode_rotated` of rotated rows f32 [R, K], whose blocks answer each other. Errors are those of the rotated
    basis: whoever rotates and scales columns does the same to every row, so that the same shares hold there.
    """
    payloads, missed = [], lined_up_room(*strips(rows).shape)
    for block, share in answers:
        mine, target = rows[block], np.empty_like(rows[block])
        answer_rows(mine, share, missed, target)
        payload = encode_rotated(target, fmt, fit, hessian, gain)
        np.subtract(strips(mine), strips(fmt.decode(payload).reshape(mine.shape)), out=missed[:, block])
        payloads.append(payload)
    return np.concatenate(payloads)


def strips(rows: F32) -> F32:
    """A view f32 [K / 16, R, 16] of rows f32 [R, K]: sixteen columns of all rows follow each other."""
    return rows.reshape(len(rows), -1, LANES).swapaxes(0, 1)


@compiled
def answer_rows(rows, share, errors, targets):
    """targets f32 [R, K] = rows + share · errors, for share f32 [R, n] and the first n rows of the errors.

    Those lie as strips f32 [K / 16, N, 16], one after another. Each sum begins with the row, and is taken in the order
    of the errors.
    """
    count, before = share.shape
    factors = np.zeros((-(-count // PANEL) * PANEL, before + LANES), np.float32)
    factors[:count, :before] = share
    out = block_of(PANEL)
    targets[:] = -rows
    for first in range(0, before, GROUP):
        depth = min(GROUP, before - first)
        for column in range(0, rows.shape[1], LANES):
            strip = errors[column // LANES, first:]
            for r in range(0, count, PANEL):
                for n in range(min(PANEL, count - r)):
                    for i in range(LANES):
                        out[n, i] = targets[r + n, column + i]
                product(out, 0, factors[:, first:], r, strip, depth)
                for n in range(min(PANEL, count - r)):
                    for i in range(LANES):
                        targets[r + n, column + i] = out[n, i]
    targets[:] = -targets
