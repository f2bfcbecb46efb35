"""Matrices side by side, to be rounded in the same launches: the first group of each, then the second group of each,
and so on. Some rows of one matrix leave most of a GPU idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....formats.fwht import GROUP
from ....lloyd.hessian.row import RowHessian
from .factors import Coupled, Factors


def beside(matrices: Tensor) -> Tensor:
    """Matrices [n, R, K] as one, [R, K · n]; or vectors [n, K] as one."""
    in_groups = matrices.view(*matrices.shape[:-1], -1, GROUP)
    return in_groups.movedim(0, -2).flatten(-3).contiguous()


def apart(made: Tensor, count: int, groups: int) -> Tensor:
    """What was made [R, groups · count · m] of so many matrices of so many groups, as [count, R, groups · m]."""
    return made.view(len(made), groups, count, -1).permute(2, 0, 1, 3).flatten(2)


def each(product: Callable[..., object], given: Tensor, out: Tensor) -> Tensor:
    """`out` [n, …] filled by product(matrix, out=…) of each given one [n, …]: by one call for each, so that the bits of
    one do not depend on those beside it.
    """
    for matrix, place in zip(given, out, strict=True):
        product(matrix, out=place)
    return out


def are_alike(hessians: Sequence[Factors | RowHessian]) -> bool:
    """Whether matrices under these Hessians can be rounded side by side."""
    shapes = {h.shape if isinstance(h, Factors) else None for h in hessians}
    return len(shapes) == 1 and None not in shapes


def factors_beside(hessians: Sequence[Factors]) -> Factors:
    """The factors of matrices side by side, in the order of their groups."""
    if len(hessians) == 1:
        return hessians[0]
    couplings = [h.coupling for h in hessians if h.coupling is not None]
    return Factors(
        _in_turns([h.matrix for h in hessians]),
        _in_turns([h.feedback for h in hessians]),
        _in_turns([h.answers for h in hessians]),
        Coupled(
            _in_turns([c.blocks for c in couplings]),
            torch.stack([c.lines for c in couplings], 2).flatten(1, 2),
            _in_turns([c.inverses for c in couplings]),
        )
        if couplings
        else None,
    )


def _in_turns(of_groups: Sequence[Tensor]) -> Tensor:
    """Matrices [m, 256, 256] of several as one [m · n, 256, 256]: the first of each, then the second of each."""
    return torch.stack(list(of_groups), 1).flatten(0, 1)
