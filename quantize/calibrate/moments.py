"""Second moments of one layer's activations, gathered while the reference forward runs it.

All sums are f64, in the order in which rows come. Rows with a value whose square f32 cannot hold are left out, and a
note says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...formats.errors import CalibrationError
from ...formats.minimax import ModelConfig
from ...formats.statistics.moment_file import (
    Arrays,
    DownForm,
    layer_tensors,
    pack_correlation,
    pack_moment,
)
from ...formats.statistics.row_file import NOBODY
from ...verify.model.reference import Observer, Routing
from ..spec.calibration_sizes import CHUNK

ATTENTION = {"q_proj": (0, "attn.in"), "o_proj": (1, "attn.out")}
"""Row of attn.counts and tensor of each input; k_proj and v_proj see what q_proj sees."""


class LayerMoments(Observer):
    """Gathers the tensors of one layer's file; `arrays` when the layer has run, `notes` on what was left out.

    With `keep_rows` the inputs of the experts are kept too, on their device.
    """

    def __init__(self, config: ModelConfig, layer: int, down: DownForm, keep_rows: bool = False) -> None:
        self.layer, self.down, self.keep_rows = layer, down, keep_rows
        self.notes: list[str] = []
        self.rows: tuple[Tensor, Tensor] | None = None
        """The inputs f32 [n, hidden] of the experts and who took them, i64 [n, k], where the layer was run."""
        self._names = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
        tensors = layer_tensors(config, down)
        self.arrays: Arrays = {
            name: np.zeros(shape, self._names[dtype]) for name, (dtype, shape) in tensors.items()
        }
        self._gate_up: Tensor | None = None
        self._pooled: Tensor | None = None
        self._all_finite = False
        self._seen: dict[int, _Seen] = {}

    def dense(self, layer: int, projection: str, inputs: Tensor) -> None:
        if projection not in ATTENTION:
            return
        row, name = ATTENTION[projection]
        rows = self._finite(inputs, f"the input of {projection}")
        self.arrays["attn.counts"][row] = len(rows)
        self.arrays[f"{name}.diagonal"][:] = mean_squares(rows).cpu().numpy()

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        rows = self._finite(inputs, "the input of the experts")
        self._all_finite = len(rows) == len(inputs)
        if self.keep_rows:
            experts = routing.ids if len(rows) == len(inputs) else _without(inputs, routing.ids)
            self.rows = inputs.float(), experts
        if not len(rows):
            raise CalibrationError(
                f"layer {self.layer}: no token reaches the experts with finite activations",
                hint="the checkpoint is damaged, or the tokens are not text of its tokenizer",
            )
        self.arrays["gate_up.tokens"][0] = len(rows)
        self._gate_up = packed(second_moment(rows) / len(rows))

    def expert(self, layer: int, expert: int, tokens: Tensor, inputs: Tensor, product: Tensor) -> None:
        """Nothing here waits for a GPU, so that it is never idle between two experts."""
        seen = inputs if self._all_finite else self._finite(inputs, None)
        good = _usable(product)
        rows, count = torch.where(good[:, None], product, 0), good.sum()
        mean = (total := second_moment(rows)) / count.clamp_min(1)
        self._pooled = total if self._pooled is None else self._pooled + total
        self._seen[expert] = _Seen(len(seen), len(rows), mean_squares(seen), count, mean.diagonal().clone())
        if self.down != "pooled" and int(count):
            self.arrays["down.moment"][expert] = (
                pack_correlation if self.down == "compact" else pack_moment
            )(mean.cpu().numpy())

    def finish(self) -> Arrays:
        """All tensors of the layer's file, once the layer has run; CalibrationError where down saw no row."""
        arrays, seen = self.arrays, self._seen
        if self._gate_up is not None:
            arrays["gate_up.moment"][:] = self._gate_up.cpu().numpy()
        order = sorted(seen)
        if order:
            for name in ("gate_up.diagonal", "down.diagonal", "down.counts"):
                of_each = [getattr(seen[e], name.replace(".", "_")) for e in order]
                arrays[name][order] = torch.stack(of_each).cpu().numpy()
            arrays["gate_up.counts"][order] = [seen[e].gate_up_count for e in order]
        for e in order:
            self._note_bad(
                seen[e].rows - int(arrays["down.counts"][e]), seen[e].rows, f"expert {e}, the input of down"
            )
        count = int(arrays["down.counts"].sum())
        if not count or self._pooled is None:
            raise CalibrationError(f"layer {self.layer}: no expert's down projection saw finite activations")
        arrays["down.pooled"][:] = packed(self._pooled / count).cpu().numpy()
        return arrays

    @property
    def unseen(self) -> list[int]:
        """Experts that no usable row of down was gathered for."""
        return [int(e) for e in np.flatnonzero(self.arrays["down.counts"] == 0)]

    def _finite(self, rows: Tensor, what: str | None) -> Tensor:
        """The rows whose energy is finite in f32; the others are counted in a note."""
        good = _usable(rows)
        bad = len(rows) - int(good.sum())
        if what:
            self._note_bad(bad, len(rows), what)
        return rows[good] if bad else rows

    def _note_bad(self, bad: int, rows: int, what: str) -> None:
        if bad:
            self.notes.append(
                f"layer {self.layer}: {what}: {bad} of {rows} rows are not finite and were left out"
            )


@dataclass(frozen=True)
class _Seen:
    """What one expert saw, on its device: tokens of gate and up with their E[x²] f64 [hidden], and of the `rows` at
    down the finite ones, i64 [], with their E[x²] f64 [I].
    """

    gate_up_count: int
    rows: int
    gate_up_diagonal: Tensor
    down_counts: Tensor
    down_diagonal: Tensor


def _usable(rows: Tensor) -> Tensor:
    """Whether the energy of each row of [n, K] is finite in f32, bool [n]."""
    energy = [chunk.float().square().sum(1) for chunk in torch.split(rows, CHUNK)]
    return torch.cat(energy).isfinite()


def _without(inputs: Tensor, ids: Tensor) -> Tensor:
    """Experts i64 [n, k] of each token, NOBODY where its inputs [n, H] are not finite."""
    return ids.masked_fill(~_usable(inputs)[:, None], NOBODY)


def packed(moment: Tensor) -> Tensor:
    """What `pack_moment` makes of a moment f64 [k, k], where that is: f32 [k(k+1)/2]."""
    k = len(moment)
    return moment.float()[torch.ones(k, k, dtype=torch.bool, device=moment.device).triu()]


def second_moment(rows: Tensor) -> Tensor:
    """Σ x xᵀ over rows [n, K], f64 [K, K], exactly symmetric, where the rows are."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in torch.split(rows, CHUNK):
        wide = chunk.double()
        total.addmm_(wide.T, wide)
    return torch.triu(total).add_(torch.triu(total, 1).T)


def mean_squares(rows: Tensor) -> Tensor:
    """E[x²] over rows [n, K], f64 [K], where the rows are; 0 without rows."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in torch.split(rows, CHUNK):
        total += chunk.double().square().sum(0)
    return total / max(len(rows), 1)
