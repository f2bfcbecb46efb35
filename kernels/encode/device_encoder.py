"""The encoder on a device: weights in, payloads out, the same bytes as `lloyd.encode` gives on the CPU.

It encodes one matrix at a time, all rows and groups at once; where groups answer the errors of others, it goes group by
group. A `DeviceEncoder` belongs to the thread that opened its back end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...formats.blocks import AffineFormat, LloydFormat
from ...formats.errors import BackendError
from ...formats.fwht import SIGNS1, SIGNS2
from ...formats.hfq.stored import StoredForm
from ...lloyd.codes.descent import shake_signs
from ...lloyd.constants import (
    BOTH_ENDS,
    GRID_STEPS,
    GROUP,
    ONE_END,
    PASSES,
    ROUNDS,
    SHAKE,
    SWEEPS,
    WHOLE_ROUNDS,
)
from ...lloyd.encode import ENCODED
from ...lloyd.group_fit import Rotated
from ...lloyd.hessian.row import RowHessian
from ...lloyd.levels.kmeans import gaussian_bounds
from ..runtime.block_table import BLOCK_THREADS, WAVE
from ..runtime.host import Argument, Backend, Buffer
from .geometry import DESCENT_WAVES, KMEANS_ROWS, PANEL, PANELS, TILE, refit_waves

SLOTS = 3
"""Sets of Hessians that stay on the device: where all experts share one, it stays."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class _Coupling:
    """A Coupling on the device: its blocks, of which no error feedback is asked, and its pulls, each transposed."""

    blocks: _Hessian
    pulls: Buffer


@dataclass(frozen=True)
class _Hessian:
    """The buffers of a Hessian on the device. `matrix` is transposed, `plain` is not."""

    of: RowHessian
    matrix: Buffer
    plain: Buffer
    feedback: Buffer
    inverse: Buffer
    weights: Buffer
    totals: Buffer
    answers: tuple[Buffer, ...] = ()
    coupling: _Coupling | None = None

    @property
    def dense(self) -> bool:
        """Whether it came from a second moment, not from channel weights."""
        return self.of.weights is None


@dataclass(frozen=True)
class _Slot:
    """Hessians that were brought to the device together; `slot` is part of their buffers' names."""

    slot: int
    found: dict[RowHessian, _Hessian]


@dataclass
class _Space:
    """Named buffers that serve one matrix after the other; a buffer grows when a larger matrix comes."""

    backend: Backend
    held: dict[str, Buffer] = field(default_factory=dict)

    def take(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer of undefined content; the one that was taken under this name before is no longer valid."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64))
        old = self.held.get(name)
        if old is None or old.dtype != kind or old.size < size:
            self.held.pop(name, None)
            del old
            self.held[name] = self.backend.alloc((max(1, size),), kind)
        found = self.held[name]
        return Buffer(self.backend, found.memory, found.address, tuple(int(n) for n in shape), kind)

    def put(self, name: str, array: NDArray[Any]) -> Buffer:
        buffer = self.take(name, array.shape, array.dtype)
        self.backend.write(buffer, array)
        return buffer


@dataclass(frozen=True)
class _Work:
    """One matrix under way: rotated rows f32 [count, 256·groups], params f32, codes u8."""

    fmt: Rotated
    count: int
    groups: int
    rows: Buffer
    params: Buffer
    codes: Buffer

    @property
    def tiles(self) -> int:
        return -(-self.count // TILE)


class DeviceEncoder:
    """Encodes matrices on the device of a back end. The bytes depend neither on the device nor on its timing."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._space = _Space(backend)
        self._signs = backend.upload(np.stack([SIGNS1, SIGNS2]))
        self._shakes = backend.upload(shake_signs(WHOLE_ROUNDS * SWEEPS).reshape(WHOLE_ROUNDS, -1))
        self._both_ends, self._one_end = (
            backend.upload(np.array(ends, np.float32)) for ends in (BOTH_ENDS, ONE_END)
        )
        books = {fmt.levels for fmt in ENCODED if isinstance(fmt, LloydFormat)}
        self._quantiles = {count: backend.upload(gaussian_bounds(count).astype(np.int32)) for count in books}
        self._slots: list[_Slot] = []

    def encode(
        self,
        weights: F32,
        form: StoredForm,
        fit: str,
        hessian: RowHessian | None = None,
        gain: float = 1.0,
        out: U8 | None = None,
    ) -> U8:
        """Payload u8 [R · K / 256 · group_bytes] of weights f32 [R, K], K a multiple of 256, stored in a rotated form.

        `fit` is exact or hessian; without a Hessian the latter does what the former does. `out` u8 of the payload's
        size receives it, if given. Raises BackendError for any other fit, TypeError for a format without rotation.
        """
        if fit not in ("exact", "hessian"):
            raise BackendError(f"the fit {fit!r} does not run on a device")
        fmt = form.format
        if not isinstance(fmt, LloydFormat | AffineFormat):
            raise TypeError(f"{fmt.name} is not a rotated format")
        if fmt not in ENCODED:
            raise BackendError(f"{fmt.name} is only decoded")
        count, columns = weights.shape
        if not weights.size:
            return np.empty(0, np.uint8)
        work = self._begin(np.ascontiguousarray(form.folded(weights), np.float32), fmt, form.scale)
        if fit == "hessian" and hessian is not None:
            self._fit(work, self._load(hessian), gain)
        else:
            self._initial(work, 0, [True] * work.groups)
            self._round(work, 0, work.groups, fitted=False)
            grid = (count, work.groups)
            self._launch("nearest", grid, (work.codes, work.rows, work.params, work.groups, 0), work.fmt)
        payload = self._space.take("payload", (fmt.nbytes(weights.size),), np.uint8)
        self._launch("pack", (columns // GROUP * count,), (payload, work.params, work.codes), fmt)
        return self.backend.download(payload, out)

    def _launch(
        self,
        name: str,
        grid: Sequence[int],
        args: Sequence[Argument],
        fmt: Rotated | None = None,
        threads: int | None = None,
    ) -> None:
        kernel = self.backend.kernel(name, fmt.name if fmt else None)
        self.backend.launch(kernel, grid, (threads or kernel.threads,), args)

    def _begin(self, weights: F32, fmt: Rotated, scale: F32 | None) -> _Work:
        space, (count, columns) = self._space, weights.shape
        groups = columns // GROUP
        given = space.put("weights", weights)
        factor = space.put("scale", np.ones(columns, np.float32) if scale is None else scale)
        rows = space.take("rows", weights.shape, np.float32)
        self._launch("rotate_rows", (groups, count), (rows, given, factor, self._signs))
        size = fmt.levels if isinstance(fmt, LloydFormat) else 2
        params = space.take("params", (count, groups, size), np.float32)
        return _Work(fmt, count, groups, rows, params, space.take("codes", weights.shape, np.uint8))

    def _initial(self, work: _Work, first: int, exact: Sequence[bool]) -> None:
        """Levels of the groups from `first` on, best in plain squared error. For groups that are not `exact`, a faster
        search comes near the best.
        """
        if isinstance(work.fmt, AffineFormat):
            shape = (work.count, work.groups, first)
            ends = (self._both_ends, len(BOTH_ENDS), self._one_end, len(ONE_END))
            args = (work.params, work.rows, *ends, GRID_STEPS, *shape)
            self._launch("affine_levels", (work.tiles, len(exact)), args, work.fmt)
            return
        blocks = -(-work.count // KMEANS_ROWS)
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
            listed = self._space.put(name, np.array(chosen, np.int32))
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
            self._launch(name, (blocks, len(chosen)), searched, work.fmt)

    def _round(self, work: _Work, first: int, number: int, fitted: bool) -> None:
        grid = (-(-work.count // BLOCK_THREADS), number)
        args = (work.params, int(fitted), work.count, work.groups, first)
        self._launch("round_levels", grid, args, work.fmt)

    def _fit(self, work: _Work, h: _Hessian, gain: float) -> None:
        """Codes and stored levels of all groups under their Hessians."""
        white = h.of.nearly_white
        if not h.answers:
            self._initial(work, 0, white)
            self._fit_groups(work, h, 0, work.groups, gain)
            return
        given = self._space.take("given rows", work.rows.shape, np.float32)
        if h.coupling:
            self.backend.copy(given, work.rows)
        for g in range(work.groups):
            self._initial(work, g, white[g : g + 1])
            self._fit_groups(work, h, g, 1, 0.0 if h.coupling else gain)
        if h.coupling:
            self._fit_again(replace(work, rows=given), h.coupling, gain)

    def _fit_groups(self, work: _Work, h: _Hessian, first: int, number: int, gain: float) -> None:
        fmt, shape = work.fmt, (work.count, work.groups, first)
        grid = (work.tiles, number)
        pulled = work.rows
        if h.dense:
            pulled = self._space.take("pulled", work.rows.shape, np.float32)
            self._multiply(work, pulled, work.rows, h, 1.0, first, number)
        self._launch("feedback", grid, (work.codes, work.rows, work.params, h.feedback, *shape), fmt)
        self._refit(work, h, pulled, first, number)
        rounds, warm = (WHOLE_ROUNDS, WHOLE_ROUNDS) if h.coupling else (ROUNDS, ROUNDS - 1)
        for n in range(rounds):
            self._descend(work, h, n, float(SHAKE) if n < warm else 0.0, first, number)
            self._refit(work, h, pulled, first, number)
        self._settle(work, h, first, number)
        if h.answers and first + 1 < work.groups:
            self._answer(work, h, first)
        # The gain comes last and is not answered by later groups, as on the CPU.
        if gain:
            self._gain(work, h, pulled, gain, first, number)

    def _fit_again(self, work: _Work, coupling: _Coupling, gain: float) -> None:
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
        self._launch("residual_rows", (work.count, groups), (errors, work.rows, *new, groups, 0), work.fmt)
        for turn in range(WHOLE_ROUNDS - 1, WHOLE_ROUNDS - 1 - PASSES, -1):
            for target, source in zip(old, new, strict=True):
                self.backend.copy(target, source)
            for g in range(groups):
                one, at = (work.count, 1), (groups, g)
                pulls = coupling.pulls.rows(g, g + 1)
                panels = (work.tiles, GROUP // PANEL)
                self._launch(
                    "answer_targets", panels, (targets, work.rows, errors, pulls, work.count, groups, g)
                )
                self._multiply(aimed, pulled, targets, h, 1.0, g, 1)
                self._descend(aimed, h, turn, float(SHAKE), g, 1)
                self._refit(aimed, h, pulled, g, 1)
                self._settle(aimed, h, g, 1)
                self._launch("add_errors", one, (sums, targets, *new, *old, *at), work.fmt)
                self._multiply(aimed, turned, sums, h, -1.0, g, 1)
                self._launch("keep_better", one, (*new, targets, turned, *old, *at), work.fmt)
                self._launch("residual_rows", one, (errors, work.rows, *new, *at), work.fmt)
                if gain and turn == WHOLE_ROUNDS - PASSES:
                    self._gain(aimed, h, pulled, gain, g, 1)

    def _settle(self, work: _Work, h: _Hessian, first: int, number: int) -> None:
        """Fitted levels in the format's precision, and codes that suit them."""
        self._round(work, first, number, fitted=True)
        self._descend(work, h, 0, 0.0, first, number)

    def _gain(self, work: _Work, h: _Hessian, pulled: Buffer, gain: float, first: int, number: int) -> None:
        args = (work.params, work.rows, work.codes, h.weights, pulled, self._signs, int(h.dense))
        self._launch("apply_gain", (work.count, number), (*args, 1 - gain, work.groups, first), work.fmt)

    def _descend(self, work: _Work, h: _Hessian, turn: int, share: float, first: int, number: int) -> None:
        fmt, turned = work.fmt, work.rows
        if h.dense:
            turned = self._space.take("turned", work.rows.shape, np.float32)
            self._multiply(work, turned, self._errors(work, first, number), h, 1.0, first, number)
        importance = (h.plain, h.inverse, h.weights, turned, self._signs)
        shakes = (self._shakes.rows(turn, turn + 1), int(h.dense), SWEEPS, share)
        args = (work.codes, work.rows, work.params, *importance, *shakes, work.count, work.groups, first)
        self._launch("descend", (-(-work.count // DESCENT_WAVES), number), args, fmt)

    def _refit(self, work: _Work, h: _Hessian, pulled: Buffer, first: int, number: int) -> None:
        fmt, shape = work.fmt, (work.count, work.groups, first)
        waves = refit_waves(fmt)
        grid, threads = (-(-work.count // waves), number), waves * WAVE
        if not h.dense:
            args = (work.params, work.codes, work.rows, h.weights, self._signs)
            self._launch("refit", grid, (*args, *shape), fmt, threads)
            return
        turned = pulled
        if isinstance(fmt, AffineFormat):
            wide = self._space.take("wide", work.codes.shape, np.float32)
            turned = self._space.take("turned", work.codes.shape, np.float32)
            self._launch("widen_codes", (-(-wide.size // BLOCK_THREADS),), (wide, work.codes, wide.size))
            self._multiply(work, turned, wide, h, -1.0, first, number)
        given = (work.params, work.codes, pulled, turned, h.plain, h.totals)
        self._launch("refit_dense", grid, (*given, *shape), fmt, threads)

    def _multiply(
        self, work: _Work, out: Buffer, y: Buffer, h: _Hessian, sign: float, first: int, number: int
    ) -> None:
        grid = (work.tiles, PANELS, number)
        self._launch("multiply_rows", grid, (out, y, h.matrix, sign, work.count, work.groups, first))

    def _errors(self, work: _Work, first: int, number: int) -> Buffer:
        """The rows minus what the decoder will make of them, f32 [R, K]."""
        errors = self._space.take("errors", work.rows.shape, np.float32)
        args = (errors, work.rows, work.params, work.codes, work.groups, first)
        self._launch("residual_rows", (work.count, number), args, work.fmt)
        return errors

    def _answer(self, work: _Work, h: _Hessian, group: int) -> None:
        """Let the columns after a group answer its errors, in place."""
        errors = self._errors(work, group, 1)
        grid = (work.tiles, PANELS * (work.groups - group - 1))
        answered = (work.rows, errors, h.answers[group], work.count, work.groups, group)
        self._launch("answer_errors", grid, answered)

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

    def _load(self, hessian: RowHessian) -> _Hessian:
        """A Hessian's buffers on the device. Where all slots are taken, the one used longest ago makes room."""
        self.bring([hessian])
        slot = next(n for n, kept in enumerate(self._slots) if hessian in kept.found)
        self._slots.append(self._slots.pop(slot))
        return self._slots[-1].found[hessian]

    def _from_weights(self, hessians: dict[RowHessian, F64], slot: int) -> dict[RowHessian, _Hessian]:
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
        args = (
            matrix,
            feedback,
            weights,
            inverse,
            failed,
            upper,
            self._space.put("given", given),
            self._signs,
        )
        self._launch("diagonal_hessian", (groups,), args)
        broken = np.count_nonzero(self.backend.download(failed))
        if broken:
            raise BackendError(f"the Hessians of {broken} of {groups} groups cannot be factored")
        found, start = {}, 0
        for h, channels in hessians.items():
            stop = start + len(channels)
            m, f, w, i = (b.rows(start, stop) for b in (matrix, feedback, weights, inverse))
            found[h] = _Hessian(h, m, m, f, i, w, i)
            start = stop
        return found

    def _put(self, hessian: RowHessian, slot: str) -> _Hessian:
        """A dense Hessian, factored on the CPU, as buffers."""
        matrices = [factor.matrix for factor in hessian.factors]
        found = self._put_dense(hessian, matrices, [factor.feedback for factor in hessian.factors], slot)
        answers = tuple(
            self._space.put(f"answer {n} {slot}", np.ascontiguousarray(a.T))
            for n, a in enumerate(hessian.answers)
        )
        return replace(found, answers=answers, coupling=self._put_coupling(hessian, slot))

    def _put_coupling(self, hessian: RowHessian, slot: str) -> _Coupling | None:
        if hessian.coupling is None:
            return None
        blocks = self._put_dense(hessian, list(hessian.coupling.blocks), None, f"{slot} again")
        turned = np.ascontiguousarray(hessian.coupling.pulls.transpose(0, 1, 3, 2))
        return _Coupling(blocks, self._space.put(f"pulls {slot}", turned))

    def _put_dense(
        self, of: RowHessian, matrices: Sequence[F32], feedback: Sequence[F32] | None, slot: str
    ) -> _Hessian:
        """Dense H f32 [256, 256] of each group as buffers; without `feedback` there is none to be asked of it."""

        def put(name: str, arrays: Sequence[NDArray[Any]]) -> Buffer:
            return self._space.put(f"{name} {slot}", np.stack(arrays).astype(np.float32, copy=False))

        turned = put("matrix", [m.T for m in matrices])
        plain = turned
        if not all(np.array_equal(m, m.T) for m in matrices):
            plain = put("plain", matrices)
        # One after the other in f32, as the CPU adds them.
        totals = [np.add.accumulate(m.reshape(-1), dtype=np.float32)[-1] for m in matrices]
        return _Hessian(
            of,
            turned,
            plain,
            turned if feedback is None else put("feedback", feedback),
            put("inverse", [np.float32(1) / np.diag(m) for m in matrices]),
            put("channels", [np.ones(GROUP, np.float32)] * len(matrices)),
            put("totals", totals),
        )
