"""Matrices side by side, to be rounded in the same launches: the first group of each, then the second group of each,
and so on. Some rows of one matrix leave most of a GPU idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....formats.fwht import GROUP
from ....lloyd.hessian.row import RowHessian
from .factors import Coupled, Factors


def beside(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices [R, K], or vectors [K], as one [R, K · n], or [K · n]."""
    if len(matrices) == 1:
        return matrices[0].contiguous()
    in_groups = [m.view(*m.shape[:-1], -1, GROUP) for m in matrices]
    return torch.stack(in_groups, -2).flatten(-3)


def apart(made: Tensor, count: int, groups: int) -> list[Tensor]:
    """What was made [R, groups · count · n] of so many matrices of so many groups, as [R, groups · n] of each."""
    if count == 1:
        return [made]
    return [one.flatten(1) for one in made.view(len(made), groups, count, -1).unbind(2)]


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
        tuple(_in_turns(answers) for answers in zip(*(h.answers for h in hessians), strict=True)),
        Coupled(
            _in_turns([c.blocks for c in couplings]),
            torch.stack([c.lines for c in couplings], 2).flatten(1, 2),
            _in_turns([c.inverses for c in couplings]),
        )
        if couplings
        else None,
    )


def _in_turns(of_groups: Sequence[Tensor]) -> Tensor:
    """Matrices [G, 256, 256] of several as one [G · n, 256, 256]: the first of each, then the second of each."""
    return torch.stack(list(of_groups), 1).flatten(0, 1)
