"""The factors of a dense Hessian in torch: what `lloyd.hessian.row.from_moment` makes, in the layout of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ....kernels.encode.hessians import DenseFactors
from ....kernels.runtime.host import Backend, Buffer
from ....lloyd.constants import EXTRA_DAMPING, GROUP
from ....lloyd.hessian.group import GroupHessian
from ....lloyd.hessian.row import UNUSABLE_MOMENT, Coupling, RowHessian, from_weights
from .moments import eye, symmetric

_DENSE = np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of G groups in torch, f32: `matrix`, `feedback` and `blocks` [G, 256, 256], `pulls`
    [G, G - 1, 256, 256], and an answer [256, columns after the group] for each group. Pulls and answers are transposed.

    `blocks` and `pulls` are missing where there is one group only, or where a block cannot be factored.
    """

    matrix: Tensor
    feedback: Tensor
    answers: tuple[Tensor, ...]
    blocks: Tensor | None
    pulls: Tensor | None
    notes: tuple[str, ...] = ()

    def on(self, backend: Backend) -> DenseFactors:
        """The same memory for the kernels of a back end."""
        return DenseFactors(
            borrowed(backend, self.matrix),
            borrowed(backend, self.feedback),
            tuple(borrowed(backend, answer) for answer in self.answers),
            None if self.blocks is None else borrowed(backend, self.blocks),
            None if self.pulls is None else borrowed(backend, self.pulls),
        )

    def on_cpu(self) -> RowHessian:
        """The same numbers for the loops of the CPU."""
        groups = zip(self.matrix.cpu().numpy(), self.feedback.cpu().numpy(), strict=True)
        coupling = None
        if self.blocks is not None and self.pulls is not None:
            pulls = np.ascontiguousarray(self.pulls.cpu().numpy().transpose(0, 1, 3, 2))
            coupling = Coupling(self.blocks.cpu().numpy(), pulls)
        return RowHessian(
            factors=tuple(GroupHessian(matrix, feedback, _DENSE) for matrix, feedback in groups),
            answers=tuple(np.ascontiguousarray(answer.cpu().numpy().T) for answer in self.answers),
            coupling=coupling,
            notes=self.notes,
        )


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


_Found = tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]


def _factored(h: Tensor) -> tuple[_Found | None, bool]:
    """The factors of h f64 [K, K], None where it is not positive definite; and whether its numbers are finite."""
    width = len(h)
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    inverse = torch.linalg.solve_triangular(lower, eye(width, h.device), upper=False)
    upper = inverse.flip(0, 1).triu()
    lines = h.view(width // GROUP, GROUP, width)
    blocks = _diagonal_blocks(h)
    roots, broken = torch.linalg.cholesky_ex(blocks)
    sound = (h.isfinite().all(), (failed == 0) & upper.isfinite().all(), (broken == 0).all())
    finite, usable, coupled = torch.stack(sound).tolist()  # the one wait for the device
    if not (finite and usable):
        return None, finite
    made = _of_groups(upper)
    if len(lines) == 1 or not coupled:
        return (*made, None, None), True
    return (*made, _mean_one(blocks), _pulls(roots, lines)), True


def _of_groups(upper: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Matrix, feedback and answers of each group from U f64 [K, K], upper triangular, with Uᵀ U = H⁻¹."""
    groups = len(upper) // GROUP
    own = _diagonal_blocks(upper)
    inverse = torch.linalg.solve_triangular(own, eye(GROUP, own.device).expand_as(own), upper=True)
    feedback = (own / own.diagonal(dim1=1, dim2=2)[:, :, None]).mT.float().contiguous()
    answered = inverse @ upper.view(groups, GROUP, -1)
    answers = tuple(answered[g, :, (g + 1) * GROUP :].float().contiguous() for g in range(groups))
    return _mean_one(symmetric(inverse @ inverse.mT)), feedback, answers


def _diagonal_blocks(h: Tensor) -> Tensor:
    """The blocks [G, 256, 256] on the diagonal of h [K, K]."""
    groups = len(h) // GROUP
    return h.view(groups, GROUP, groups, GROUP).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _mean_one(matrices: Tensor) -> Tensor:
    """f32, each of mean diagonal 1."""
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    return (matrices / trace[:, None, None] * GROUP).float()


def _pulls(roots: Tensor, lines: Tensor) -> Tensor:
    """-H_gg⁻¹ H_gr for each group g and every other group r, transposed: f32 [G, G - 1, 256, 256]."""
    groups = len(lines)
    # Not by cholesky_solve: what solves several systems there waits for the whole device.
    lower = torch.linalg.solve_triangular(roots, eye(GROUP, roots.device).expand_as(roots), upper=False)
    pull: Tensor = ((lower.mT @ -lower) @ lines).float().view(groups, GROUP, groups, GROUP)
    each = torch.arange(groups, device=roots.device)[:, None]
    others = torch.arange(groups - 1, device=roots.device).expand(groups, -1)
    others = others + (others >= each)
    return pull.permute(0, 2, 3, 1)[each, others].contiguous()
