"""The Hessian of a whole row of several groups, and how later groups answer the error of an earlier one.

With U the upper factor of the damped inverse, H⁻¹ = Uᵀ U: inside group g the Schur complement S_g = (U_ggᵀ U_gg)⁻¹ is
the cost of an error after the later groups have answered it, its feedback factor is U_gg, and the later groups answer
an error E_g by E_g · U_gg⁻¹ · U_gr. One factorisation serves every row of a matrix. Products run on lanes in a fixed
order; the factorisation is LAPACK's.

Source: Frantar et al., "GPTQ" (2022), in blocks of one group, with S_g in place of the plain block.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...formats.lapack import cholesky, invert_lower
from ..constants import EXTRA_DAMPING, GROUP, INDEPENDENT, LONE, WHOLE
from ..loops import compiled
from ..simd.lanes import PANEL, gather, product, scatter_at
from ..simd.vec import LANES
from .group import UNUSABLE, GroupHessian, bounded, from_bounded, nearly_equal

UNUSABLE_MOMENT = "second moment is not usable: rounded to nearest"


def shakes_of(dense: int, coupled: bool) -> tuple[np.float32, ...]:
    """The shakes of the rounds in which each group of a row is fitted, where so many groups have a dense Hessian."""
    if coupled:
        return WHOLE
    return LONE if dense == 1 else INDEPENDENT


@dataclass(frozen=True, eq=False)
class Coupling:
    """How the G groups of a row answer each other once all are rounded (lloyd/again.py).

    `blocks` f32 [G, 256, 256] are the plain blocks H_gg, each with mean diagonal 1. `pulls` f32 [G, G - 1, 256, 256]
    hold for each group g and every other group r, in order, -H_gg⁻¹ H_gr: an error e_r moves the target of g by
    -pull · e_r.
    """

    blocks: NDArray[np.float32]
    pulls: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RowHessian:
    """What is known of the inputs of a matrix's rows, in the stored basis: G groups of 256 columns. One of two forms:

    - `weights` f64 [G, 256]: the channel weights of a diagonal importance, each group bounded and of mean 1. Groups
      are independent. `groups` factors them when it is first asked; a device factors them itself and never asks.
    - `factors`: one dense GroupHessian per group, from a second moment. `answers` holds for each group the matrix f32
      [columns after the group, 256] by which later targets answer its error; it is empty where groups are independent.
      `coupling` is what further passes over whole rows need; None where there are none.

    `notes` says in words what was replaced because it could not be used. Instances are compared by identity, and can
    be used by any number of threads.
    """

    weights: NDArray[np.float64] | None = None
    factors: tuple[GroupHessian, ...] = ()
    answers: tuple[NDArray[np.float32], ...] = ()
    coupling: Coupling | None = None
    notes: tuple[str, ...] = ()
    _factored: list[GroupHessian] = field(default_factory=list, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def shakes(self) -> tuple[np.float32, ...]:
        """The shakes of the rounds in which each group is fitted."""
        return shakes_of(len(self.factors), self.coupling is not None)

    @property
    def groups(self) -> tuple[GroupHessian, ...]:
        """One GroupHessian per 256 columns; those of `weights` are factored once, by the thread that asks first."""
        if self.weights is None:
            return self.factors
        with self._lock:
            if not self._factored:
                self._factored.extend(from_bounded(w) for w in self.weights)
        return tuple(self._factored)

    @property
    def nearly_white(self) -> list[bool]:
        """For each group, whether all its channels weigh about the same; known without factoring anything."""
        if self.weights is None:
            return [factor.nearly_white for factor in self.factors]
        return [nearly_equal(w.astype(np.float32)) for w in self.weights]


def from_weights(weights: NDArray[np.float64]) -> RowHessian:
    """From damped channel weights d/s² f64 [K]: independent groups. A group without usable weights counts as white."""
    found = [bounded(weights[i : i + GROUP]) for i in range(0, len(weights), GROUP)]
    usable = np.array([np.ones(GROUP) if w is None else w for w in found]).reshape(-1, GROUP)
    return RowHessian(usable, notes=counted([UNUSABLE for w in found if w is None], len(found)))


def counted(notes: Sequence[str], groups: int) -> tuple[str, ...]:
    """Each distinct note once, with the number of groups that it is of."""
    return tuple(f"{note} in {n} of {groups} groups" for note, n in Counter(notes).items())


def from_moment(moment: NDArray[np.float64]) -> RowHessian:
    """From a damped second moment in the stored basis, f64 [K, K].

    A moment that cannot be factored is damped further, and in the end replaced by the identity; `notes` says which.
    """
    ones = np.ones((len(moment) // GROUP, GROUP))
    white = RowHessian(ones, notes=(UNUSABLE_MOMENT,))
    mean = float(np.trace(moment)) / len(moment) if np.isfinite(moment).all() else 0.0
    if not mean > 0:
        return white
    scaled = moment / mean
    for extra in EXTRA_DAMPING:
        factor = reversed_factor(scaled, extra)
        inverse = None if factor is None else reversed_inverse(factor)
        if factor is not None and inverse is not None:
            notes = (f"second moment damped by a further {extra:g}",) if extra else ()
            scaled[np.diag_indices_from(scaled)] += extra
            return _from_factor(factor, inverse, coupling_of(scaled), notes)
    return white


def reversed_factor(h: NDArray[np.float64], damping: float = 0.0) -> NDArray[np.float64] | None:
    """V f64 [K, K], upper triangular, with V Vᵀ = h + damping · I; None where that is not positive definite.

    What is below the diagonal is of no meaning. V is a view: rows and columns of h lie in memory in reversed order, in
    which V is the usual lower factor.
    """
    reverse = h[::-1, ::-1].copy()
    reverse[np.diag_indices_from(reverse)] += damping
    return reverse[::-1, ::-1] if cholesky(reverse) else None


def reversed_inverse(factor: NDArray[np.float64]) -> NDArray[np.float32] | None:
    """U = V⁻¹ f32 [K, K] of a `reversed_factor`, as that lies in memory; None where it is not finite."""
    reverse = factor[::-1, ::-1].astype(np.float32)
    if not (invert_lower(reverse) and np.isfinite(reverse).all()):
        return None
    return reverse[::-1, ::-1]


def coupling_of(h: NDArray[np.float64]) -> Coupling | None:
    """The coupling of a positive definite h f64 [K, K]; None for one group, or where a block cannot be factored."""
    groups = len(h) // GROUP
    if groups == 1:
        return None
    blocks = np.empty((groups, GROUP, GROUP), np.float32)
    pulls = np.empty((groups, groups - 1, GROUP, GROUP), np.float32)
    for g in range(groups):
        lines = h[g * GROUP : (g + 1) * GROUP]
        block = lines[:, g * GROUP : (g + 1) * GROUP]
        factor = reversed_factor(block)
        if factor is None:
            return None
        upper = _inverted(factor)
        blocks[g] = block / np.trace(block) * GROUP
        pull = (upper.T @ -upper).astype(np.float32) @ lines.astype(np.float32)
        others = [r for r in range(groups) if r != g]
        pulls[g] = pull.reshape(GROUP, groups, GROUP).transpose(1, 0, 2)[others]
    return Coupling(blocks, pulls)


def _inverted(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of an upper triangular f64 [256, 256] with a diagonal that is not zero; what is below is ignored."""
    lower = np.tril(upper.T)
    usable = invert_lower(lower)
    assert usable
    return lower.T


def _from_factor(
    factor: NDArray[np.float64],
    inverse: NDArray[np.float32],
    coupling: Coupling | None,
    notes: tuple[str, ...],
) -> RowHessian:
    """From V and U = V⁻¹, whose blocks on the diagonal are each other's inverses."""
    groups, answers = [], []
    for start in range(0, len(factor), GROUP):
        own, later = slice(start, start + GROUP), slice(start + GROUP, None)
        block = np.triu(factor[own, own])
        schur, upper = block @ block.T, _inverted(block)
        feedback = (upper / np.diag(upper)[:, None]).T
        groups.append(
            GroupHessian(
                np.ascontiguousarray(schur / np.trace(schur) * GROUP, dtype=np.float32),
                np.ascontiguousarray(feedback, dtype=np.float32),
                np.empty(0, np.float32),
            )
        )
        answers.append(np.ascontiguousarray((block.astype(np.float32) @ inverse[own, later]).T))
    return RowHessian(factors=tuple(groups), answers=tuple(answers), coupling=coupling, notes=notes)


@compiled
def answer_rows(rows, column, errors, answer):
    """rows[:, column:] -= errors · answerᵀ in place; rows f32 [R, K], errors [R, 256], answer [K - column, 256]."""
    e = np.empty((GROUP, LANES), np.float32)
    y = np.empty((GROUP, LANES), np.float32)
    for first in range(0, rows.shape[0], LANES):
        gather(errors, first, 0, e)
        for start in range(0, answer.shape[0], GROUP):
            gather(rows, first, column + start, y)
            for i in range(0, GROUP, PANEL):
                product(y, i, answer, start + i, e, GROUP)
            scatter_at(y, rows, first, column + start)


def compensate(
    rows: NDArray[np.float32], group: int, errors: NDArray[np.float32], answers: Sequence[NDArray[np.float32]]
) -> None:
    """Let the columns after `group` answer its errors f32 [R, 256]: rows f32 [R, K] change in place."""
    if answers and len(answers[group]):
        answer_rows(rows, (group + 1) * GROUP, errors, answers[group])
