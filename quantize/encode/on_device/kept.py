"""The importances of a layer whose experts' inputs lie on a device of torch's, with the layer's weights beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....awq.from_moments import CalibratedLayer
from ....awq.importance import Importance
from ....awq.own_moments import WithRows
from ....awq.row_answers import RowAnswers
from ....formats.minimax import PROJECTIONS, expert_name
from ....verify.model.device_weights import DeviceMatrix
from .moments import Whitening, mixed, whitening


@dataclass(frozen=True)
class KeptOnDevice(WithRows):
    """One layer, as a calibration gathers it, and what its experts saw: an importance for any number of threads. Each
    of `others` is the same on another device, for experts that are rounded there.

    `rows` f32 [tokens, hidden] are the inputs of gate and up, `order` i64 the tokens sorted by expert, those of expert
    e from starts[e] to starts[e + 1], ascending. `gate_up` f64 [hidden, hidden] and `down` f64 [I, I] are the moments
    that all experts share, with their whitenings. `matrix` gives a weight of the layer, complete on one of
    the devices. `shares` are those of `answers`, where there are any.
    """

    rows: Tensor
    order: Tensor
    starts: NDArray[np.int64]
    gate_up: Tensor
    down: Tensor
    white: Whitening | None
    white_down: Whitening | None
    matrix: Callable[[str], DeviceMatrix | Tensor]
    shares: tuple[tuple[slice, Tensor], ...] | None = None
    others: tuple[KeptOnDevice, ...] = ()

    def at(self, place: int) -> KeptOnDevice:
        """The same on the device of this number, 0 being this one."""
        return self.others[place - 1] if place else self

    def on(self, device: torch.device) -> KeptOnDevice:
        """The same on another device."""
        rows, order, gate_up, down = (t.to(device) for t in (self.rows, self.order, self.gate_up, self.down))
        white, white_down = (None if w is None else w.to(device) for w in (self.white, self.white_down))
        return replace(
            self,
            rows=rows,
            order=order,
            gate_up=gate_up,
            down=down,
            white=white,
            white_down=white_down,
            shares=_shares_on(self.answers, device),
        )

    def inputs(self, expert: int) -> NDArray[np.float32]:
        """The rows f32 [n, hidden] that one expert's gate and up see, in the machine's memory."""
        seen: NDArray[np.float32] = self.seen(expert).cpu().numpy()
        return seen

    def from_rows(
        self,
        expert: int,
        projection: str,
        rows: NDArray[np.float32],
        sums: NDArray[Any] | None = None,
        room: NDArray[np.float64] | None = None,
    ) -> Importance:
        """The importance of one matrix whose inputs are these rows f32 [n, K]."""
        there = torch.from_numpy(np.require(rows, requirements=["C", "W"])).to(self.rows.device)
        moment = self.mixed(expert, projection, there).cpu().numpy()
        return Importance(np.diag(moment).copy(), moment, float(len(rows)))

    def seen(self, expert: int) -> Tensor:
        """The rows f32 [n, hidden] that one expert's gate and up see."""
        return self.rows[self.order[self.starts[expert] : self.starts[expert + 1]]]

    def weights(self, expert: int) -> dict[str, Tensor]:
        """The matrices f32 of an expert on this device; errors as `Source.stored`."""
        given = {p: self.matrix(expert_name(self.layer, expert, p)) for p in PROJECTIONS}
        here = {p: matrix.to(self.rows.device) for p, matrix in given.items()}
        return {p: m if isinstance(m, Tensor) else m.values() for p, m in here.items()}

    def mixed(self, expert: int, projection: str, rows: Tensor) -> Tensor:
        """The moment f64 [K, K] of one matrix whose inputs are these rows f32 [n, K]."""
        if projection != "w2":
            return mixed(rows, self.gate_up, self.white)
        prior = self.gathered.of(expert, "w2").moment
        if prior is self.gathered.down_pooled:
            return mixed(rows, self.down, self.white_down)
        own = torch.from_numpy(prior).to(self.rows.device)
        return mixed(rows, own, whitening(own))


def keep_on_device(
    gathered: CalibratedLayer,
    rows: Tensor,
    experts: Tensor,
    matrix: Callable[[str], DeviceMatrix | Tensor],
    others: Sequence[torch.device] = (),
    answers: RowAnswers | None = None,
) -> KeptOnDevice:
    """The importances of a layer whose inputs are rows f32 [tokens, hidden], taken by `experts` i64 [tokens, k].

    `others` are further devices on which experts are rounded, `answers` say how rows of down answer each other.
    """
    assert gathered.gate_up.moment is not None
    taken = experts.flatten()
    by_expert = taken.argsort(stable=True)
    count = len(gathered.counts["w1"])
    starts = torch.searchsorted(taken[by_expert], torch.arange(count + 1, device=taken.device)).cpu().numpy()
    gate_up, down = (
        torch.from_numpy(moment).to(rows.device) for moment in (gathered.gate_up.moment, gathered.down_pooled)
    )
    order = by_expert // experts.shape[1]
    kept = KeptOnDevice(
        gathered,
        answers,
        rows,
        order,
        starts,
        gate_up,
        down,
        whitening(gate_up),
        whitening(down),
        matrix,
        _shares_on(answers, rows.device),
    )
    return replace(kept, others=tuple(kept.on(device) for device in others))


def _shares_on(answers: RowAnswers | None, device: torch.device) -> tuple[tuple[slice, Tensor], ...] | None:
    if answers is None:
        return None
    return tuple((rows, torch.from_numpy(share).to(device)) for rows, share in answers)
