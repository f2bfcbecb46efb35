"""The factors of a dense Hessian in torch: what `lloyd.hessian.row.from_moment` makes, in the layout of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....kernels.encode.hessians import DenseFactors
from ....kernels.runtime.host import Backend, Buffer
from ....lloyd.constants import EXTRA_DAMPING, GROUP
from ....lloyd.hessian.group import GroupHessian
from ....lloyd.hessian.row import UNUSABLE_MOMENT, Coupling, RowHessian, from_weights
from .moments import eye, symmetric

_DENSE = np.empty(0, np.float32)


class Coupled(NamedTuple):
    """f32 `blocks` and `inverses` [G, 256, 256] and `lines` [G, G, 256, 256], each matrix transposed."""

    blocks: Tensor
    lines: Tensor
    inverses: Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of G groups in torch, f32: `matrix` and `feedback` [G, 256, 256], and for each group but the first an
    answer [g, 256, 256], transposed, one after the other in `answers`. There is no coupling where there is one group
    only, or where a block cannot be factored.
    """

    matrix: Tensor
    feedback: Tensor
    answers: Tensor
    coupling: Coupled | None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, bool]:
        """The groups, and whether they are coupled."""
        return len(self.matrix), self.coupling is not None

    def on(self, backend: Backend) -> DenseFactors:
        """The same memory for the kernels of a back end."""
        return DenseFactors(
            borrowed(backend, self.matrix),
            borrowed(backend, self.feedback),
            borrowed(backend, self.answers),
            *(() if self.coupling is None else (borrowed(backend, t) for t in self.coupling)),
        )

    def on_cpu(self) -> RowHessian:
        """The same numbers for the loops of the CPU."""
        groups = zip(self.matrix.cpu().numpy(), self.feedback.cpu().numpy(), strict=True)
        first = np.empty((0, GROUP, GROUP), np.float32)
        return RowHessian(
            factors=tuple(GroupHessian(matrix, feedback, _DENSE) for matrix, feedback in groups),
            answers=(first, *map(_transposed, torch.split(self.answers, list(range(1, len(self.matrix)))))),
            coupling=self.coupling
            and Coupling(*map(_transposed, (self.coupling.lines, self.coupling.inverses))),
            notes=self.notes,
        )


def _transposed(matrices: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = matrices.mT.contiguous().cpu().numpy()
    return found


def borrowed(backend: Backend, tensor: Tensor) -> Buffer:
    """A contiguous tensor on a back end's device as one of its buffers."""
    assert tensor.is_contiguous()
    kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return backend.borrowed(tensor, tensor.data_ptr(), tensor.shape, kind)


def factors_of(moment: Tensor) -> Factors | RowHessian:
    """From a damped moment in the stored basis, f64 [K, K]: as `from_moment`, whose notes it has.

    A moment that cannot be used at all gives the Hessian of white inputs.
    """
    mean = moment.diagonal().mean()
    scaled = torch.where(mean > 0, moment / mean, torch.nan)
    for extra in EXTRA_DAMPING:
        damped = scaled if not extra else scaled + extra * eye(len(scaled), scaled.device)
        found, sound = _factored(damped)
        if found is not None:
            notes = (f"second moment damped by a further {extra:g}",) if extra else ()
            return Factors(*found, notes)
        if not sound:
            break
    return RowHessian(from_weights(np.ones(len(moment))).weights, notes=(UNUSABLE_MOMENT,))


_Found = tuple[Tensor, Tensor, Tensor, Coupled | None]


def _factored(h: Tensor) -> tuple[_Found | None, bool]:
    """The factors of h f64 [K, K], None where it is not positive definite; and whether its numbers are finite. Waits
    for the device once where it is.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    blocks = _diagonal_blocks(h)
    roots, broken = torch.linalg.cholesky_ex(blocks)
    made = _of_groups(lower.flip(0, 1))
    usable = [part.isfinite().all() for part in made[1:]]  # not so where h is not finite
    *factored, coupled = torch.stack([failed == 0, *usable, (broken == 0).all()]).tolist()
    if not all(factored):
        return None, bool(h.isfinite().all())
    return (*made, _coupled(h, blocks, roots) if len(blocks) > 1 and coupled else None), True


def _of_groups(upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix, feedback and answers of each group from V f64 [K, K], upper triangular, with V Vᵀ = H."""
    own = _diagonal_blocks(upper)
    inverse = torch.linalg.solve_triangular(own, eye(GROUP, own.device).expand_as(own), upper=True)
    feedback = (inverse / inverse.diagonal(dim1=1, dim2=2)[:, :, None]).mT.float().contiguous()
    columns, minus = torch.split(upper.float(), GROUP, 1), (-inverse.float()).unbind()
    before = range(1, len(minus))
    answers = feedback.new_empty(sum(before) * GROUP, GROUP)
    for g, out in zip(before, torch.split(answers, [g * GROUP for g in before]), strict=True):
        torch.mm(columns[g][: g * GROUP], minus[g], out=out)
    return _mean_one(symmetric(own @ own.mT)), feedback, answers.view(-1, GROUP, GROUP)


def _diagonal_blocks(h: Tensor) -> Tensor:
    """The blocks [G, 256, 256] on the diagonal of h [K, K]."""
    down, across = h.stride()
    return h.as_strided((len(h) // GROUP, GROUP, GROUP), (GROUP * (down + across), down, across)).contiguous()


def _mean_one(matrices: Tensor) -> Tensor:
    """f32, each of mean diagonal 1."""
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    return (matrices / trace[:, None, None] * GROUP).float()


def _coupled(h: Tensor, blocks: Tensor, roots: Tensor) -> Coupled:
    """The coupling of h f64 [K, K], given the blocks f64 [G, 256, 256] on its diagonal and their Cholesky factors."""
    groups = len(blocks)
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    # Not by cholesky_solve: what solves several systems there waits for the whole device.
    lower = torch.linalg.solve_triangular(roots, eye(GROUP, roots.device).expand_as(roots), upper=False)
    lines = (h.view(groups, GROUP, groups, GROUP).permute(2, 0, 1, 3) / mean[:, None]).float().contiguous()
    own = lines.diagonal(dim1=0, dim2=1).permute(2, 0, 1).contiguous()
    return Coupled(own, lines, ((lower.mT @ lower) * -mean).float().contiguous())
