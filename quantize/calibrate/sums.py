"""Sums over rows of activations, in f64, where the rows are.

Torch is called as seldom as can be: each call hands the interpreter on, which beside encoders takes longer than the
work of a GPU. The rows of several experts are prepared together, and each sum has the bits that it has alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import repeat

import torch
from torch import Tensor

from ..spec.calibration_sizes import CHUNK


def usable(rows: Tensor) -> Tensor:
    """Whether f32 holds the energy of each row of f32 [n, K], and so its root, bool [n, 1]."""
    finite: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True) < torch.inf
    return finite


def packed(moment: Tensor) -> Tensor:
    """What `pack_moment` makes of a moment f64 [k, k], where that is: f32 [k(k+1)/2]."""
    rows, columns = torch.triu_indices(len(moment), len(moment), device=moment.device)
    return moment.float()[rows, columns]


def second_moment(rows: Tensor) -> Tensor:
    """Σ x xᵀ over rows [n, K], f64 [K, K]. Only what is not below the diagonal is used of it."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for chunk in _chunks(rows):
        wide = chunk.double()
        total.addmm_(wide.T, wide)
    return total


def second_moments(some: Sequence[Tensor], together: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The `second_moment` of each of some tensors f32 [n, K] on one device, over its usable rows, f64 [m, K, K]; and
    which of all their rows are usable, bool [N, 1]. So many rows are `together` in f64, and at least CHUNK.
    """
    width, finite = some[0].shape[1], []
    totals = some[0].new_zeros(len(some), width, width, dtype=torch.float64)
    of_each = totals.unbind()
    for block in _blocks(some, together):
        finite.append(_add_usable([chunk for _, chunk in block], [of_each[n] for n, _ in block]))
    return totals, _joined(finite)


def _add_usable(chunks: list[Tensor], totals: Sequence[Tensor]) -> Tensor:
    """Add Σ x xᵀ over the usable rows of each chunk to its total; returns which rows of all these are usable."""
    rows, sizes = _joined(chunks), [len(chunk) for chunk in chunks]
    finite = usable(rows)
    wide = torch.where(finite, rows, 0).double()
    pairs = zip(torch.split(wide.T, sizes, 1), torch.split(wide, sizes), strict=True)
    for total, (across, down) in zip(totals, pairs, strict=True):
        total.addmm_(across, down)
    return finite


def squares(rows: Tensor, good: Tensor | None = None) -> Tensor:
    """Σ x² over rows [n, K], or over those that are `good`, bool [n, 1]; f64 [K]."""
    parts: Iterable[Tensor] = _chunks(rows)
    if good is not None:
        parts = map(torch.where, _chunks(good), parts, repeat(0))
    return reduce(torch.add, (torch.float_power(part, 2).sum(0) for part in parts))


def _chunks(rows: Tensor) -> Sequence[Tensor]:
    """Some rows after others."""
    return torch.split(rows, CHUNK) if len(rows) > CHUNK else (rows,)


def _blocks(some: Sequence[Tensor], together: int) -> Iterator[list[tuple[int, Tensor]]]:
    """The chunks of some tensors, each with the number of its tensor: so many as have `together` rows, or one."""
    block: list[tuple[int, Tensor]] = []
    room = together
    for n, rows in enumerate(some):
        for chunk in _chunks(rows):
            if block and len(chunk) > room:
                yield block
                block, room = [], together
            block.append((n, chunk))
            room -= len(chunk)
    if block:
        yield block


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
