"""The Hessian of a whole row of several groups, and how later groups answer the errors of earlier ones.

With V the upper factor of the damped moment, H = V Vᵀ, the errors e of a row cost |e V|², in which group g is Σ_r≤g e_r
V_rg. So the target of g answers the errors of the groups before it by e_r V_rg V_gg⁻¹, and what g then adds is under
S_g = V_gg V_ggᵀ, the Schur complement of what comes later, whose feedback factor is V_gg⁻¹. One factorisation serves
every row of a matrix. Products run on lanes in a fixed order; the factorisation is LAPACK's.

Source: Frantar et al., "GPTQ" (2022), in blocks of one group, with S_g in place of the plain block; in the form without
the inverse of Chee et al., "QuIP" (2023).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...formats.lapack import cholesky, invert_lower
from ..constants import EXTRA_DAMPING, GROUP, INDEPENDENT, LONE, WHOLE
from ..loops import compiled
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

    `lines` f32 [G, G, 256, 256] hold for each group g the blocks H_gr, so scaled that H_gg has mean diagonal 1;
    `inverses` f32 [G, 256, 256] are -H_gg⁻¹ at that scale.
    """

    lines: NDArray[np.float32]
    inverses: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RowHessian:
    """What is known of the inputs of a matrix's rows, in the stored basis: G groups of 256 columns. One of two forms:

    - `weights` f64 [G, 256]: the channel weights of a diagonal importance, each group bounded and of mean 1. Groups
      are independent. `groups` factors them when it is first asked; a device factors them itself and never asks.
    - `factors`: one dense GroupHessian per group, from a second moment. `answers` f32 [g, 256, 256] holds for each
      group g and every earlier one a matrix: an error e_r moves the target of g by -answer · e_r. It is empty where
      groups are independent. `coupling` is what further passes over whole rows need; None where there are none.

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
    """From a damped second moment in the stored basis, f64 [K, K], which stays as it is.

    A moment that cannot be factored is damped further, and in the end replaced by the identity; `notes` says which.
    """
    return from_fresh_moment(moment.copy)


def from_fresh_moment(make: Callable[[], NDArray[np.float64]]) -> RowHessian:
    """As `from_moment` of what `make` gives, which is overwritten. It is asked anew before each further damping."""
    moment = make()
    white = RowHessian(np.ones((len(moment) // GROUP, GROUP)), notes=(UNUSABLE_MOMENT,))
    mean = float(np.trace(moment)) / len(moment) if np.isfinite(moment).all() else 0.0
    if not mean > 0:
        return white
    for extra in EXTRA_DAMPING:
        given = make() if extra else moment
        coupling, factor = coupling_of(given, extra * mean), reversed_factor(given, mean, extra)
        found = None if factor is None else _from_factor(factor)
        if found is not None:
            notes = (f"second moment damped by a further {extra:g}",) if extra else ()
            return replace(found, coupling=coupling, notes=notes)
    return white


def reversed_factor(
    h: NDArray[np.float64], mean: float = 1.0, damping: float = 0.0
) -> NDArray[np.float64] | None:
    """V f64 [K, K], upper triangular, with V Vᵀ = h / mean + damping · I; None where that is not positive definite.

    What is below the diagonal is of no meaning. V is a view of h, which is overwritten: its rows and columns lie there
    in reversed order, in which V is the usual lower factor.
    """
    diagonal = np.diag(h)[::-1] / mean + damping
    reverse(h, mean)
    np.fill_diagonal(h, diagonal)
    return h[::-1, ::-1] if cholesky(h) else None


@compiled
def reverse(h, mean):
    """Below its diagonal, h f64 [K, K] becomes h / mean read backwards, which is what lies above the diagonal."""
    last = len(h) - 1
    for i in range(1, len(h)):
        for j in range(i):
            h[i, j] = h[last - i, last - j] / mean


def coupling_of(h: NDArray[np.float64], damping: float = 0.0) -> Coupling | None:
    """The coupling of h + damping · I, f64 [K, K]; None for one group, or where a block cannot be factored."""
    groups = len(h) // GROUP
    if groups == 1:
        return None
    lines = np.empty((groups, groups, GROUP, GROUP), np.float32)
    inverses = np.empty((groups, GROUP, GROUP), np.float32)
    for g in range(groups):
        line = h[g * GROUP : (g + 1) * GROUP]
        block = line[:, g * GROUP : (g + 1) * GROUP].copy()
        block[np.diag_indices_from(block)] += damping
        mean = float(np.trace(block)) / GROUP
        if not mean > 0:
            return None
        block /= mean
        by_group = line.reshape(GROUP, groups, GROUP).transpose(1, 0, 2)
        np.divide(by_group, mean, out=lines[g], casting="same_kind")
        lines[g, g] = block
        factor = reversed_factor(block)
        if factor is None:
            return None
        upper = _inverted(factor)
        inverses[g] = upper.T @ -upper
    return Coupling(lines, inverses)


def _inverted(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of an upper triangular f64 [256, 256] with a diagonal that is not zero; what is below is ignored."""
    lower = np.tril(upper.T)
    usable = invert_lower(lower)
    assert usable
    return lower.T


def _from_factor(factor: NDArray[np.float64]) -> RowHessian | None:
    """From V; None where f32 cannot hold what follows from it."""
    groups, answers = [], []
    for start in range(0, len(factor), GROUP):
        own = slice(start, start + GROUP)
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
        with np.errstate(over="ignore"):
            answer = -upper.T.astype(np.float32) @ factor[:start, own].astype(np.float32).T
        if not np.isfinite(answer).all():
            return None
        by_group = answer.reshape(GROUP, -1, GROUP).transpose(1, 0, 2)
        answers.append(np.ascontiguousarray(by_group))
    return RowHessian(factors=tuple(groups), answers=tuple(answers))
