"""The launches that find levels and codes of a matrix under its Hessian, in the order of `lloyd`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...formats.blocks import AffineFormat, LloydFormat
from ...lloyd.constants import (
    BOTH_ENDS,
    GRID_STEPS,
    GROUP,
    ONE_END,
    PASSES,
    SHAKE,
    SWEEPS,
    WHOLE,
)
from ...lloyd.encode import ENCODED
from ...lloyd.group_fit import SIGNS, Rotated
from ...lloyd.hessian.row import shakes_of
from ...lloyd.levels.kmeans import gaussian_bounds
from ..runtime.block_table import BLOCK_THREADS, WAVE
from ..runtime.host import Argument, Backend, Buffer
from .geometry import DESCENT_WAVES, KMEANS_ROWS, PRODUCT_SIDE, TILE, dense_waves, refit_waves
from .hessians import Coupling, Hessian
from .space import Space


@dataclass(frozen=True)
class Work:
    """One matrix under way: rotated rows f32 [count, 256·groups], params f32, codes u8."""

    fmt: Rotated
    count: int
    groups: int
    rows: Buffer
    params: Buffer
    codes: Buffer

    def blocks(self, rows: int) -> int:
        """Blocks of so many rows."""
        return -(-self.count // rows)


class Fitting:
    """Launches the kernels that fit a matrix, on the device of a back end."""

    def __init__(self, backend: Backend, space: Space, signs: Buffer) -> None:
        """`signs` f32 [2, 256] are those of the rotation."""
        self._backend, self._space, self._signs = backend, space, signs
        self._shakes = backend.upload(SIGNS.reshape(len(SIGNS) // SWEEPS, -1))
        self._both_ends, self._one_end = (
            backend.upload(np.array(ends, np.float32)) for ends in (BOTH_ENDS, ONE_END)
        )
        books = {fmt.levels for fmt in ENCODED if isinstance(fmt, LloydFormat)}
        self._quantiles = {count: backend.upload(gaussian_bounds(count).astype(np.int32)) for count in books}

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        args: Sequence[Argument],
        fmt: Rotated | None = None,
        threads: int | None = None,
    ) -> None:
        """Launch a kernel, that of the format where it is built per format."""
        kernel = self._backend.kernel(name, fmt.name if fmt else None)
        self._backend.launch(kernel, grid, (threads or kernel.threads,), args)

    def nearest(self, work: Work) -> None:
        """Stored levels of all groups from the initial ones, and for each weight the nearest of them."""
        self._round(work, 0, work.groups, fitted=False)
        grid = (work.count, work.groups)
        self.launch("nearest", grid, (work.codes, work.rows, work.params, work.groups, 0), work.fmt)

    def groups(self, work: Work, h: Hessian, gain: float) -> None:
        """All groups under their Hessians, where none answers the errors of others."""
        self.initial(work, 0, h.white)
        self._fit_groups(work, h, 0, work.groups, gain)

    def whole_rows(self, work: Work, h: Hessian, gain: float) -> None:
        """One group after the other, where later ones answer the errors of earlier ones, and in the end all of all."""
        given = self._space.take("given rows", work.rows.shape, np.float32)
        if h.coupling:
            self._backend.copy(given, work.rows)
        for g in range(work.groups):
            self.initial(work, g, h.white[g : g + 1])
            self._fit_groups(work, h, g, 1, 0.0 if h.coupling else gain)
        if h.coupling:
            self._fit_again(replace(work, rows=given), h.coupling, gain)

    def initial(self, work: Work, first: int, exact: Sequence[bool]) -> None:
        """Levels of the groups from `first` on, best in plain squared error. For groups that are not `exact`, a faster
        search comes near the best.
        """
        if isinstance(work.fmt, AffineFormat):
            shape = (work.count, work.groups, first)
            ends = (self._both_ends, len(BOTH_ENDS), self._one_end, len(ONE_END))
            args = (work.params, work.rows, *ends, GRID_STEPS, *shape)
            self.launch("affine_levels", (work.blocks(TILE), len(exact)), args, work.fmt)
            return
        blocks = work.blocks(KMEANS_ROWS)
        for wanted, name in ((True, "kmeans_exact"), (False, "kmeans_pairs")):
            chosen = [first + n for n, is_exact in enumerate(exact) if is_exact == wanted]
            if not chosen:
                continue
            scratch: tuple[Buffer, ...] = ()
            if wanted:
                total = blocks * len(chosen)
                paths = (total, work.fmt.levels, KMEANS_ROWS, GROUP)
                scratch = (
                    self._space.take("energies", (total, KMEANS_ROWS, 2, GROUP + 1), np.float64),
                    self._space.take("paths", paths, np.uint8),
                )
            listed = self._space.numbers(chosen)
            quantiles = self._quantiles[work.fmt.levels]
            searched: tuple[Argument, ...] = (
                work.params,
                *scratch,
                work.rows,
                listed,
                quantiles,
                work.count,
                work.groups,
            )
            self.launch(name, (blocks, len(chosen)), searched, work.fmt)

    def _round(self, work: Work, first: int, number: int, fitted: bool) -> None:
        grid = (work.blocks(BLOCK_THREADS), number)
        args = (work.params, int(fitted), work.count, work.groups, first)
        self.launch("round_levels", grid, args, work.fmt)

    def _fit_groups(self, work: Work, h: Hessian, first: int, number: int, gain: float) -> None:
        fmt, shape = work.fmt, (work.count, work.groups, first)
        grid = (work.blocks(TILE), number)
        pulled = work.rows
        if h.dense:
            pulled = self._space.take("pulled", work.rows.shape, np.float32)
            self._multiply(work, pulled, work.rows, h, 1.0, first, number)
        self.launch("feedback", grid, (work.codes, work.rows, work.params, h.feedback, *shape), fmt)
        self._refit(work, h, pulled, first, number)
        shakes = shakes_of(work.groups if h.dense else 0, h.coupling is not None)
        for n, shake in enumerate(shakes):
            self._descend(work, h, n, float(shake), first, number)
            self._refit(work, h, pulled, first, number)
        self._settle(work, h, first, number)
        if h.answers and first + 1 < work.groups:
            self._answer(work, h, first)
        # The gain comes last and is not answered by later groups, as on the CPU.
        if gain:
            self._gain(work, h, pulled, gain, first, number)

    def _fit_again(self, work: Work, coupling: Coupling, gain: float) -> None:
        """The passes of lloyd.again over groups that have been fitted; work.rows are as they were given."""
        space, h, groups = self._space, coupling.blocks, work.groups
        targets, errors, sums, turned, pulled = (
            space.take(name, work.rows.shape, np.float32)
            for name in ("targets", "standing errors", "sums", "turned sums", "pulled")
        )
        old = (
            space.take("old params", work.params.shape, np.float32),
            space.take("old codes", work.codes.shape, np.uint8),
        )
        new = (work.params, work.codes)
        aimed = replace(work, rows=targets)
        self.launch("residual_rows", (work.count, groups), (errors, work.rows, *new, groups, 0), work.fmt)
        for turn in range(len(WHOLE) - 1, len(WHOLE) - 1 - PASSES, -1):
            for target, source in zip(old, new, strict=True):
                self._backend.copy(target, source)
            for g in range(groups):
                one, at = (work.count, 1), (groups, g)
                pulls = coupling.pulls.rows(g, g + 1)
                tiles = (work.blocks(PRODUCT_SIDE), GROUP // PRODUCT_SIDE)
                self.launch(
                    "answer_targets", tiles, (targets, work.rows, errors, pulls, work.count, groups, g)
                )
                self._multiply(aimed, pulled, targets, h, 1.0, g, 1)
                self._descend(aimed, h, turn, float(SHAKE), g, 1)
                self._refit(aimed, h, pulled, g, 1)
                self._settle(aimed, h, g, 1)
                self.launch("add_errors", one, (sums, targets, *new, *old, *at), work.fmt)
                self._multiply(aimed, turned, sums, h, -1.0, g, 1)
                self.launch("keep_better", one, (*new, targets, turned, *old, *at), work.fmt)
                self.launch("residual_rows", one, (errors, work.rows, *new, *at), work.fmt)
                if gain and turn == len(WHOLE) - PASSES:
                    self._gain(aimed, h, pulled, gain, g, 1)

    def _settle(self, work: Work, h: Hessian, first: int, number: int) -> None:
        """Fitted levels in the format's precision, and codes that suit them."""
        self._round(work, first, number, fitted=True)
        self._descend(work, h, 0, 0.0, first, number)

    def _gain(self, work: Work, h: Hessian, pulled: Buffer, gain: float, first: int, number: int) -> None:
        args = (work.params, work.rows, work.codes, h.weights, pulled, self._signs, int(h.dense))
        self.launch("apply_gain", (work.count, number), (*args, 1 - gain, work.groups, first), work.fmt)

    def _descend(self, work: Work, h: Hessian, turn: int, share: float, first: int, number: int) -> None:
        fmt, turned = work.fmt, work.rows
        if h.dense:
            turned = self._space.take("turned", work.rows.shape, np.float32)
            self._multiply(work, turned, self._errors(work, first, number), h, 1.0, first, number)
        importance = (h.plain, h.inverse, h.weights, turned, self._signs)
        shakes = (self._shakes.rows(turn, turn + 1), int(h.dense), SWEEPS, share)
        args = (work.codes, work.rows, work.params, *importance, *shakes, work.count, work.groups, first)
        self.launch("descend", (work.blocks(DESCENT_WAVES), number), args, fmt)

    def _refit(self, work: Work, h: Hessian, pulled: Buffer, first: int, number: int) -> None:
        fmt, shape = work.fmt, (work.count, work.groups, first)
        if not h.dense:
            waves = refit_waves(fmt)
            args = (work.params, work.codes, work.rows, h.weights, self._signs, *shape)
            self.launch("refit", (work.blocks(waves), number), args, fmt, waves * WAVE)
            return
        turned = pulled
        if isinstance(fmt, AffineFormat):
            wide = self._space.take("wide", work.codes.shape, np.float32)
            turned = self._space.take("turned", work.codes.shape, np.float32)
            self.launch("widen_codes", (-(-wide.size // BLOCK_THREADS),), (wide, work.codes, wide.size))
            self._multiply(work, turned, wide, h, -1.0, first, number)
        waves = dense_waves(fmt)
        given = (work.params, work.codes, pulled, turned, h.plain, h.totals, *shape)
        self.launch("refit_dense", (work.blocks(waves), number), given, fmt, waves * WAVE)

    def _multiply(
        self, work: Work, out: Buffer, y: Buffer, h: Hessian, sign: float, first: int, number: int
    ) -> None:
        grid = (work.blocks(PRODUCT_SIDE), GROUP // PRODUCT_SIDE, number)
        self.launch("multiply_rows", grid, (out, y, h.matrix, sign, work.count, work.groups, first))

    def _errors(self, work: Work, first: int, number: int) -> Buffer:
        """The rows minus what the decoder will make of them, f32 [R, K]."""
        errors = self._space.take("errors", work.rows.shape, np.float32)
        args = (errors, work.rows, work.params, work.codes, work.groups, first)
        self.launch("residual_rows", (work.count, number), args, work.fmt)
        return errors

    def _answer(self, work: Work, h: Hessian, group: int) -> None:
        """Let the columns after a group answer its errors, in place."""
        errors = self._errors(work, group, 1)
        grid = (work.blocks(PRODUCT_SIDE), GROUP // PRODUCT_SIDE * (work.groups - group - 1))
        answered = (work.rows, errors, h.answers[group], work.count, work.groups, group)
        self.launch("answer_errors", grid, answered)
