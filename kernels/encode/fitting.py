"""The launches that find levels and codes of a matrix under its Hessian, in the order of `lloyd`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

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
    WHOLE_SWEEPS,
)
from ...lloyd.encode import ENCODED
from ...lloyd.group_fit import SIGNS, Rotated
from ...lloyd.hessian.row import shakes_of
from ...lloyd.levels.kmeans import gaussian_bounds
from ..runtime.block_table import BLOCK_THREADS, WAVE
from ..runtime.host import Argument, Backend, Buffer
from .geometry import DESCENT_WAVES, KMEANS_ROWS, PRODUCT_SIDE, TILE, dense_waves, refit_waves
from .hessians import Coupling, Hessian
from .recordings import Recordings
from .shares import Answers
from .space import Space
from .work import Work, kept_of

FROM_WEIGHTS, FROM_SUMS, GIVEN = range(3)
"""Where the pull of a descent comes from; encode_fit.hip knows the numbers."""


def coupled(work: Work, h: Hessian) -> bool:
    """Whether groups answer each other: there is a matrix for each group but the first."""
    return h.dense and len(h.answers) == work.own - 1


class Fitting:
    """Launches the kernels that fit a matrix, on the device of a back end."""

    def __init__(self, backend: Backend, space: Space, signs: Buffer) -> None:
        """`signs` f32 [2, 256] are those of the rotation."""
        self._backend, self._space, self._signs = backend, space, signs
        self._recordings = Recordings(backend, space)
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

    def fit(self, work: Work, h: Hessian, gain: float, answers: Answers | None) -> None:
        """Codes and stored levels of all rows under their Hessians; where there are `answers`, block by block."""
        if answers is None:
            self._fit_rows(work, h, gain)
            return
        missed = self._space.take("missed", work.rows.shape, np.float32)
        most = max(rows.stop - rows.start for rows, _ in answers)
        for rows, share in answers:
            mine = work.part(rows)
            block = self._block(mine, most)
            if rows.start:
                grid = (mine.blocks(PRODUCT_SIDE), mine.rows.shape[1] // PRODUCT_SIDE)
                before = missed.rows(0, rows.start)
                given = (block.rows, mine.rows, share, before, mine.count, rows.start, work.groups)
                self.launch("answer_rows", grid, given)
            else:
                self._backend.copy(block.rows, mine.rows)
            self._fit_rows(block, h, gain)
            self._backend.copy(mine.params, block.params)
            self._backend.copy(mine.codes, block.codes)
            if rows.stop < work.count:
                self._missed(mine, missed.rows(rows.start, rows.stop), 0, work.groups)

    def _block(self, part: Work, most: int) -> Work:
        """Room for some rows of a matrix, and for their params and codes: the same memory for all its blocks, of which
        none has more than `most` rows, so that they have one recording.
        """

        def room(name: str, given: Buffer) -> Buffer:
            return self._space.take(name, (most, *given.shape[1:]), given.dtype).rows(0, part.count)

        return replace(
            part,
            rows=room("rows of a block", part.rows),
            params=room("params of a block", part.params),
            codes=room("codes of a block", part.codes),
        )

    def _fit_rows(self, work: Work, h: Hessian, gain: float) -> None:
        """Where groups answer each other, that takes hundreds of launches, which are the same for every matrix of a
        shape, and so they are recorded.
        """
        if not coupled(work, h):
            self.groups(work, h, gain)
            return
        coupling = (h.coupling.lines, h.coupling.inverses) if h.coupling else ()
        places = (work.rows, work.params, work.codes, h.matrix, *h.answers, *coupling)
        shape = (work.fmt.name, work.count, work.groups, work.beside, gain, h.white)
        key = (*shape, *(buffer.address for buffer in places))
        self._recordings.run(key, partial(self.whole_rows, work, h, gain))

    def groups(self, work: Work, h: Hessian, gain: float) -> None:
        """All groups under their Hessians, where none answers the errors of others."""
        self.initial(work, 0, h.white)
        self._fit_groups(work, h, 0, work.groups, gain)

    def whole_rows(self, work: Work, h: Hessian, gain: float) -> None:
        """One group after the other, where each answers the errors of earlier ones, and in the end those of all."""
        targets, errors = (
            self._space.take(name, work.rows.shape, np.float32) for name in ("targets", "errors")
        )
        aimed = replace(work, rows=targets)
        n = work.beside
        for g in range(work.own):
            mine, first = aimed if g else work, g * n
            if g:
                self._answer(work, targets, work.rows, errors, h.answers[g - 1], (0, g), g)
            self.initial(mine, first, h.white[first : first + n])
            self._fit_groups(mine, h, first, n, 0.0 if h.coupling else gain)
            self._missed(work, errors, first, n)
        if h.coupling:
            self._fit_again(work, aimed, errors, h.coupling, gain)

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
        if h.dense:
            self._multiply(work, kept_of(self._space, work, number).pulled, work.rows, h, first, number)
        grid = (work.blocks(TILE), number)
        self.launch("feedback", grid, (work.codes, work.rows, work.params, h.feedback, *shape), fmt)
        self._refit(work, h, first, number, fresh=True)
        sweeps = WHOLE_SWEEPS if h.coupling else SWEEPS
        shakes = shakes_of(work.own if h.dense else 0, h.coupling is not None)
        for n, shake in enumerate(shakes):
            self._descend(work, h, n, float(shake), first, number, sweeps)
            self._refit(work, h, first, number)
        self._settle(work, h, first, number)
        # The gain comes last and is not answered by later groups, as on the CPU.
        if gain:
            self._gain(work, h, gain, first, number)

    def _fit_again(self, work: Work, aimed: Work, errors: Buffer, coupling: Coupling, gain: float) -> None:
        """The passes of lloyd.again over groups that have been fitted, whose errors are given; `aimed` is `work` with
        room for targets as its rows.
        """
        space, h, n, fmt = self._space, coupling.blocks, work.beside, work.fmt
        values, pulls = (space.take(name, work.rows.shape, np.float32) for name in ("values", "pulls"))
        old = (
            space.take("old params", work.params.shape, np.float32),
            space.take("old codes", work.codes.shape, np.uint8),
        )
        new, waves = (work.params, work.codes), dense_waves(fmt)
        for turn in range(len(WHOLE) - 1, len(WHOLE) - 1 - PASSES, -1):
            for target, source in zip(old, new, strict=True):
                self._backend.copy(target, source)
            for g in range(work.own):
                first = g * n
                each, at = (work.count, n), (work.groups, first)
                dense, inverses = kept_of(space, work, n), coupling.inverses.rows(first, first + n)
                self._answer(work, pulls, None, errors, coupling.lines.rows(g, g + 1), (0, work.own), g)
                self.launch("decoded_rows", each, (values, *new, *at), fmt)
                self._answer(work, aimed.rows, values, pulls, inverses, (g, 1), g)
                self._sum_grid(work, h, first, n)
                begun = (
                    dense.sums,
                    dense.pulled,
                    dense.before,
                    *new,
                    pulls,
                    h.plain,
                    h.ones,
                    work.count,
                    *at,
                )
                self.launch("begin_again", (work.blocks(waves), n), begun, fmt, waves * WAVE)
                self._descend(aimed, h, turn, float(SHAKE), first, n, WHOLE_SWEEPS, pulls)
                self._refit(aimed, h, first, n)
                self._settle(aimed, h, first, n)
                self.launch("keep_better", each, (*new, dense.left, pulls, *old, *at), fmt)
                self._missed(work, errors, first, n)
                if gain and turn == len(WHOLE) - PASSES:
                    self._gain(aimed, h, gain, first, n)

    def _settle(self, work: Work, h: Hessian, first: int, number: int) -> None:
        """Fitted levels in the format's precision, and codes that suit them."""
        self._round(work, first, number, fitted=True)
        self._descend(work, h, 0, 0.0, first, number)

    def _gain(self, work: Work, h: Hessian, gain: float, first: int, number: int) -> None:
        pulled = kept_of(self._space, work, number).pulled if h.dense else work.rows
        args = (work.params, work.rows, work.codes, h.weights, pulled, self._signs, int(h.dense))
        self.launch("apply_gain", (work.count, number), (*args, 1 - gain, work.groups, first), work.fmt)

    def _descend(
        self,
        work: Work,
        h: Hessian,
        turn: int,
        share: float,
        first: int,
        number: int,
        sweeps: int = SWEEPS,
        pulls: Buffer | None = None,
    ) -> None:
        """Sweeps over all columns. Under a dense H the pull comes from sums where `pulls` do not give it."""
        turned, left, sums, where = work.rows, work.rows, work.rows, FROM_WEIGHTS
        if h.dense:
            dense = kept_of(self._space, work, number)
            turned, left, sums, where = dense.pulled, dense.left, dense.sums, FROM_SUMS
        if pulls is not None:
            turned, where = pulls, GIVEN
        importance = (h.plain, h.inverse, h.weights, turned, sums, h.ones, self._signs)
        shakes = (self._shakes.rows(turn, turn + 1), where, sweeps, share)
        given = (work.codes, left, work.rows, work.params)
        args = (*given, *importance, *shakes, work.count, work.groups, first)
        self.launch("descend", (work.blocks(DESCENT_WAVES), number), args, work.fmt)

    def _refit(self, work: Work, h: Hessian, first: int, number: int, fresh: bool = False) -> None:
        fmt, shape = work.fmt, (work.count, work.groups, first)
        if not h.dense:
            waves = refit_waves(fmt)
            args = (work.params, work.codes, work.rows, h.weights, self._signs, *shape)
            self.launch("refit", (work.blocks(waves), number), args, fmt, waves * WAVE)
            return
        if fresh:
            self._sum_grid(work, h, first, number)
        dense, waves = kept_of(self._space, work, number), dense_waves(fmt)
        kept = (dense.sums, dense.before, dense.pulled)
        given = (work.params, work.codes, *kept, h.plain, h.totals, h.ones, int(fresh), *shape)
        self.launch("refit_dense", (work.blocks(waves), number), given, fmt, waves * WAVE)

    def _sum_grid(self, work: Work, h: Hessian, first: int, number: int) -> None:
        """The sums of a grid, H · codes, all anew; a codebook's are added up where they are asked for."""
        if isinstance(work.fmt, AffineFormat):
            wide = self._space.take("wide", work.codes.shape, np.float32)
            self.launch("widen_codes", (-(-wide.size // BLOCK_THREADS),), (wide, work.codes, wide.size))
            self._multiply(work, kept_of(self._space, work, number).sums, wide, h, first, number)

    def _multiply(self, work: Work, out: Buffer, y: Buffer, h: Hessian, first: int, number: int) -> None:
        grid = (work.blocks(PRODUCT_SIDE), GROUP // PRODUCT_SIDE, number)
        self.launch("multiply_rows", grid, (out, y, h.matrix, work.count, work.groups, first))

    def _missed(self, work: Work, errors: Buffer, first: int, number: int) -> None:
        """errors f32 [R, K] become the rows minus what the decoder will make of them."""
        args = (errors, work.rows, work.params, work.codes, work.groups, first)
        self.launch("residual_rows", (work.count, number), args, work.fmt)

    def _answer(
        self,
        work: Work,
        out: Buffer,
        rows: Buffer | None,
        errors: Buffer,
        matrices: Buffer,
        others: tuple[int, int],
        group: int,
    ) -> None:
        """A group of `out`, in each matrix, becomes that of the rows, moved by the errors of `others`, a first group
        and a number; or without rows the opposite of what those move.
        """
        grid = (work.blocks(PRODUCT_SIDE), GROUP // PRODUCT_SIDE, work.beside)
        given = (out, errors if rows is None else rows, errors, matrices, int(rows is not None), *others)
        self.launch("answer_errors", grid, (*given, work.count, work.groups, group))
