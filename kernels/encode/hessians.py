"""Hessians on a device: brought there from the machine's memory, made there from channel weights, or given there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import BackendError
from ...lloyd.constants import GROUP
from ...lloyd.hessian.row import RowHessian
from ..runtime.host import Backend, Buffer
from .space import Space

SLOTS = 3
"""Sets of Hessians that stay on the device: where all experts share one, it stays."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DenseFactors:
    """A dense Hessian in a device's memory: of each of the G groups `matrix`, which is symmetric, and `feedback`, both
    f32 [G, 256, 256], and what a RowHessian calls `answers`, of all groups but the first, and `coupling`, each matrix
    transposed.

    Answers, f32 [g, 256, 256], lie one after the other in one buffer; `lines` are f32 [G, G, 256, 256], `blocks` what
    is on their diagonal, `inverses` f32 [G, 256, 256].
    """

    matrix: Buffer
    feedback: Buffer
    answers: Buffer
    blocks: Buffer | None = None
    lines: Buffer | None = None
    inverses: Buffer | None = None


@dataclass(frozen=True)
class Coupling:
    """A Coupling on the device: its blocks H_gg, of which no error feedback is asked, its lines f32 [G, G · 256, 256]
    and its inverses f32 [G, 256, 256], each matrix transposed.
    """

    blocks: Hessian
    lines: Buffer
    inverses: Buffer


@dataclass(frozen=True)
class Hessian:
    """The buffers of a Hessian on the device. `matrix` is transposed, `plain` is not. `white` says for each group
    whether all channels weigh about the same, `dense` whether it came from a second moment, not from channel weights.
    `answers` are those of all groups but the first. Of a dense H, `totals` are the sums and `ones` those of its rows.
    """

    white: tuple[bool, ...]
    dense: bool
    matrix: Buffer
    plain: Buffer
    feedback: Buffer
    inverse: Buffer
    weights: Buffer
    totals: Buffer
    ones: Buffer
    answers: tuple[Buffer, ...] = ()
    coupling: Coupling | None = None


@dataclass(frozen=True)
class _Slot:
    """Hessians that were brought to the device together; `slot` is part of their buffers' names."""

    slot: int
    found: dict[RowHessian, Hessian]


class Hessians:
    """The Hessians that an encoder has on its device."""

    def __init__(self, backend: Backend, space: Space, signs: Buffer) -> None:
        """`signs` f32 [2, 256] are those of the rotation."""
        self._backend, self._space, self._signs = backend, space, signs
        self._slots: list[_Slot] = []
        self._last: tuple[DenseFactors, Hessian] | None = None

    def bring(self, hessians: Sequence[RowHessian]) -> None:
        """Bring the Hessians of one call to the device together, those that are not there yet.

        BackendError where one cannot be factored, which for weights that are bounded does not happen.
        """
        new = [h for h in dict.fromkeys(hessians) if not any(h in kept.found for kept in self._slots)]
        if not new:
            return
        slot = self._slots.pop(0).slot if len(self._slots) == SLOTS else len(self._slots)
        made = self._from_weights({h: h.weights for h in new if h.weights is not None}, slot)
        made |= {h: self._put(h, f"{slot} {n}") for n, h in enumerate(new) if h.weights is None}
        self._slots.append(_Slot(slot, made))

    def load(self, hessian: RowHessian) -> Hessian:
        """A Hessian's buffers on the device. Where all slots are taken, the one used longest ago makes room."""
        self.bring([hessian])
        slot = next(n for n, kept in enumerate(self._slots) if hessian in kept.found)
        self._slots.append(self._slots.pop(slot))
        return self._slots[-1].found[hessian]

    def given(self, factors: DenseFactors) -> Hessian:
        """Factors that were made on the device, until others are given; always in the same memory."""
        if self._last is None or self._last[0] is not factors:
            self._last = factors, self._brought(factors)
        return self._last[1]

    def _brought(self, factors: DenseFactors) -> Hessian:
        answers = _of_groups(self._space.keep("answers given", factors.answers), factors.matrix.shape[0])
        found = replace(self._given("given", factors.matrix, factors.feedback), answers=answers)
        if factors.blocks is None or factors.lines is None or factors.inverses is None:
            return found
        blocks = self._given("given again", factors.blocks, factors.blocks)
        lines = self._space.keep("lines given", factors.lines)
        return replace(
            found, coupling=Coupling(blocks, lines, self._space.keep("inverses given", factors.inverses))
        )

    def _given(self, name: str, matrix: Buffer, feedback: Buffer) -> Hessian:
        space, groups = self._space, matrix.shape[0]
        kept = space.keep(f"matrix {name}", matrix)
        inverse = space.take(f"inverse {name}", (groups, GROUP), np.float32)
        totals = space.take(f"totals {name}", (groups,), np.float32)
        ones = space.take(f"ones {name}", (groups, GROUP), np.float32)
        kernel = self._backend.kernel("dense_sums")
        self._backend.launch(kernel, (groups,), (kernel.threads,), (totals, ones, inverse, kept))
        channels = space.put(f"channels {name}", np.ones((groups, GROUP), np.float32))
        followed = kept if feedback is matrix else space.keep(f"feedback {name}", feedback)
        return Hessian((False,) * groups, True, kept, kept, followed, inverse, channels, totals, ones)

    def _from_weights(self, hessians: dict[RowHessian, F64], slot: int) -> dict[RowHessian, Hessian]:
        """Hessians of channel weights f64 [G, 256], factored on the device, all in one launch."""
        if not hessians:
            return {}
        given = np.concatenate(list(hessians.values()))
        groups = len(given)
        square, row = (groups, GROUP, GROUP), (groups, GROUP)

        def take(name: str, shape: Sequence[int]) -> Buffer:
            return self._space.take(f"{name} {slot}", shape, np.float32)

        matrix, feedback = take("matrix", square), take("feedback", square)
        weights, inverse = take("channels", row), take("inverse", row)
        failed = self._space.take("failed", (groups,), np.int32)
        upper = self._space.take("upper", square, np.float64)
        channels = self._space.put("given", given)
        kernel = self._backend.kernel("diagonal_hessian")
        args = (matrix, feedback, weights, inverse, failed, upper, channels, self._signs)
        self._backend.launch(kernel, (groups,), (kernel.threads,), args)
        broken = np.count_nonzero(self._backend.download(failed))
        if broken:
            raise BackendError(f"the Hessians of {broken} of {groups} groups cannot be factored")
        found, start = {}, 0
        for h, listed in hessians.items():
            stop = start + len(listed)
            m, f, w, i = (b.rows(start, stop) for b in (matrix, feedback, weights, inverse))
            found[h] = Hessian(tuple(h.nearly_white), False, m, m, f, i, w, i, i)
            start = stop
        return found

    def _put(self, hessian: RowHessian, slot: str) -> Hessian:
        """A dense Hessian, factored on the CPU, as buffers."""
        matrices = [factor.matrix for factor in hessian.factors]
        found = self._put_dense(hessian, matrices, [factor.feedback for factor in hessian.factors], slot)
        answers = tuple(
            self._space.put(f"answer {n} {slot}", _transposed(a)) for n, a in enumerate(hessian.answers[1:])
        )
        return replace(found, answers=answers, coupling=self._put_coupling(hessian, slot))

    def _put_coupling(self, hessian: RowHessian, slot: str) -> Coupling | None:
        if hessian.coupling is None:
            return None
        lines = hessian.coupling.lines
        blocks = [lines[g, g] for g in range(len(lines))]
        return Coupling(
            self._put_dense(hessian, blocks, None, f"{slot} again"),
            self._space.put(f"lines {slot}", _transposed(lines)),
            self._space.put(f"inverses {slot}", _transposed(hessian.coupling.inverses)),
        )

    def _put_dense(
        self, of: RowHessian, matrices: Sequence[F32], feedback: Sequence[F32] | None, slot: str
    ) -> Hessian:
        """Dense H f32 [256, 256] of each group as buffers; without `feedback` there is none to be asked of it."""

        def put(name: str, arrays: Sequence[NDArray[Any]]) -> Buffer:
            return self._space.put(f"{name} {slot}", np.stack(arrays).astype(np.float32, copy=False))

        turned = put("matrix", [m.T for m in matrices])
        plain = turned
        if not all(np.array_equal(m, m.T) for m in matrices):
            plain = put("plain", matrices)
        # One after the other in f32, as the CPU adds them.
        totals = [np.add.accumulate(m.reshape(-1), dtype=np.float32)[-1] for m in matrices]
        return Hessian(
            tuple(of.nearly_white),
            True,
            turned,
            plain,
            turned if feedback is None else put("feedback", feedback),
            put("inverse", [np.float32(1) / np.diag(m) for m in matrices]),
            put("channels", [np.ones(GROUP, np.float32)] * len(matrices)),
            put("totals", totals),
            put("ones", [np.add.accumulate(m, axis=0, dtype=np.float32)[-1] for m in matrices]),
        )


def _transposed(matrices: F32) -> F32:
    """Matrices f32 [..., 256, 256], each transposed."""
    return np.ascontiguousarray(np.swapaxes(matrices, -1, -2))


def _of_groups(answers: Buffer, groups: int) -> tuple[Buffer, ...]:
    """The answers of each group but the first, of matrices side by side that have so many groups together."""
    own = 1 + 2 * answers.shape[0] // groups
    beside = groups // own
    starts = [beside * g * (g - 1) // 2 for g in range(1, own + 1)]
    return tuple(answers.rows(start, stop) for start, stop in pairwise(starts))
