"""The encoder on a device: weights in, payloads out, the same bytes as `lloyd.encode` gives on the CPU.

It encodes one matrix at a time, all rows and groups at once; where groups answer the errors of others, it goes group by
group. A `DeviceEncoder` belongs to the thread that opened its back end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import AffineFormat, Format, LloydFormat
from ...formats.errors import BackendError
from ...formats.fwht import SIGNS1, SIGNS2
from ...formats.hfq.stored import StoredForm
from ...lloyd.constants import GROUP
from ...lloyd.encode import ENCODED
from ...lloyd.group_fit import Rotated
from ...lloyd.hessian.row import RowHessian
from ...lloyd.row_blocks import RowAnswers
from ..runtime.host import Backend, Buffer
from .fitting import Fitting
from .hessians import DenseFactors, Hessians
from .shares import Answers, Shares
from .space import Space
from .work import Work

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Coded:
    """A matrix as the device holds it once it is encoded, until the next one is: its payload u8, its levels f32
    [R, G, n], or (zero, scale), as they are stored, and its codes u8 [R, 256·G].
    """

    payload: Buffer
    params: Buffer
    codes: Buffer


class DeviceEncoder:
    """Encodes matrices on the device of a back end. The bytes depend neither on the device nor on its timing."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._space = Space(backend)
        self._signs = backend.upload(np.stack([SIGNS1, SIGNS2]))
        self._hessians = Hessians(backend, self._space, self._signs)
        self._fitting = Fitting(backend, self._space, self._signs)
        self._answers = Shares()

    def bring(self, hessians: Sequence[RowHessian]) -> None:
        """Bring the Hessians of one call to the device together, those that are not there yet."""
        self._hessians.bring(hessians)

    def encode(
        self,
        weights: F32,
        form: StoredForm,
        fit: str,
        hessian: RowHessian | None = None,
        gain: float = 1.0,
        out: U8 | None = None,
        answers: RowAnswers | None = None,
    ) -> U8:
        """Payload u8 [R · K / 256 · group_bytes] of weights f32 [R, K], K a multiple of 256, stored in a rotated form.

        `fit` is exact or hessian; without a Hessian the latter does what the former does. `out` u8 of the payload's
        size receives it, if given. `answers` say how rows answer each other under a Hessian, in blocks of multiples of
        16. Raises BackendError for any other fit, TypeError for a format without rotation.
        """
        if fit not in ("exact", "hessian"):
            raise BackendError(f"the fit {fit!r} does not run on a device")
        fmt = _rotated(form.format)
        if not weights.size:
            return np.empty(0, np.uint8)
        given = self._space.put("weights", np.ascontiguousarray(form.folded(weights), np.float32))
        work = self._begin(given, fmt, self._scale(form.scale, weights.shape[1]))
        if fit == "hessian" and hessian is not None:
            there = None if answers is None else self._answers.of(answers, self._space.put)
            self._fitting.fit(work, self._hessians.load(hessian), gain, there)
        else:
            self._fitting.initial(work, 0, [True] * work.groups)
            self._fitting.nearest(work)
        return self.backend.download(self._packed(work).payload, out)

    def encode_here(
        self,
        weights: Buffer,
        fmt: Format,
        scale: Buffer,
        hessian: RowHessian | DenseFactors,
        gain: float = 1.0,
        beside: int = 1,
        answers: Answers | None = None,
    ) -> Coded:
        """Encode weights f32 [R, K] that the device holds, folded already, under a Hessian; scale f32 [K] is the AWQ
        scale of the columns. The weights may be several matrices `beside` each other, as `Work` has them, if groups of
        each are coupled: the factors then follow each other as the groups do, and what groups answer is [g, beside, …].

        `answers` say how rows answer each other. Raises TypeError for a format without rotation.
        """
        work = self._begin(weights, _rotated(fmt), scale, beside)
        there = None if answers is None else self._answers.of(answers, self._space.keep)
        if isinstance(hessian, DenseFactors):
            self._fitting.fit(work, self._hessians.given(hessian), gain, there)
        else:
            self._fitting.fit(work, self._hessians.load(hessian), gain, there)
        return self._packed(work)

    def _scale(self, scale: F32 | None, columns: int) -> Buffer:
        return self._space.put("scale", np.ones(columns, np.float32) if scale is None else scale)

    def _begin(self, weights: Buffer, fmt: Rotated, scale: Buffer, beside: int = 1) -> Work:
        space, (count, columns) = self._space, weights.shape
        groups = columns // GROUP
        rows = space.take("rows", weights.shape, np.float32)
        self._fitting.launch("rotate_rows", (groups, count), (rows, weights, scale, self._signs))
        size = fmt.levels if isinstance(fmt, LloydFormat) else 2
        params = space.take("params", (count, groups, size), np.float32)
        codes = space.take("codes", weights.shape, np.uint8)
        return Work(fmt, count, groups, rows, params, codes, beside)

    def _packed(self, work: Work) -> Coded:
        nbytes = work.fmt.nbytes(work.rows.size)
        payload = self._space.take("payload", (nbytes,), np.uint8)
        grid, args = (work.groups * work.count,), (payload, work.params, work.codes)
        self._fitting.launch("pack", grid, args, work.fmt)
        return Coded(payload, work.params, work.codes)


def _rotated(fmt: Format) -> Rotated:
    if not isinstance(fmt, LloydFormat | AffineFormat):
        raise TypeError(f"{fmt.name} is not a rotated format")
    if fmt not in ENCODED:
        raise BackendError(f"{fmt.name} is only decoded")
    return fmt
