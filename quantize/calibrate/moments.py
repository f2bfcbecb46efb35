"""Second moments of one layer's activations, gathered while the reference forward runs it.

All sums are f64, in the order in which rows come, on any devices. Rows with a value whose square f32 cannot hold are
left out, and a note says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.errors import CalibrationError
from ...formats.minimax import ModelConfig
from ...formats.statistics.moment_file import Arrays, DownForm, layer_tensors
from ...formats.statistics.row_file import NOBODY
from ...formats.statistics.triangles import pack_correlation, pack_moment
from ...verify.model.device_weights import brought, by_device
from ...verify.model.reference import Observer, Routing
from ..spec.calibration_sizes import BLOCK, CHUNK
from .sums import packed, second_moment, second_moments, squares, usable

ATTENTION = {"q_proj": (0, "attn.in"), "o_proj": (1, "attn.out")}
"""Row of attn.counts and tensor of each input; k_proj and v_proj see what q_proj sees."""


class LayerMoments(Observer):
    """Gathers the tensors of one layer's file; `arrays` when the layer has run, `notes` on what was left out.

    With `keep_rows` the inputs of the experts are kept too, on their device. Experts may run on other devices. What
    down of so many of them `at_once` sees waits there, of fewer where they have many rows, until its sums are added on
    the first device, in the order of the experts.
    """

    def __init__(
        self, config: ModelConfig, layer: int, down: DownForm, keep_rows: bool = False, at_once: int = 1
    ) -> None:
        self.layer, self.down, self.keep_rows, self._at_once = layer, down, keep_rows, at_once
        self.notes: list[str] = []
        self.rows: tuple[Tensor, Tensor] | None = None
        """The inputs f32 [n, hidden] of the experts and who took them, i64 [n, k], where the layer was run."""
        self._names = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
        tensors = layer_tensors(config, down)
        self.arrays: Arrays = {
            name: np.zeros(shape, self._names[dtype]) for name, (dtype, shape) in tensors.items()
        }
        self._gate_up_rows: Tensor | None = None
        self._pooled: Tensor | None = None
        self._together = CHUNK * min(at_once, BLOCK)
        self._waiting: dict[int, Tensor] = {}
        self._down_seen: list[_Down] = []
        self._first = torch.device("cpu")
        self._all_finite = False
        self._attended: dict[str, list[_Attended]] = defaultdict(list)
        self._gate_up_seen: dict[int, _GateUp] = {}

    def dense(self, layer: int, projection: str, inputs: Tensor) -> None:
        if projection not in ATTENTION:
            return
        good = usable(inputs)
        self._attended[projection].append(_Attended(len(inputs), good.sum(0), squares(inputs, good)))

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        rows = self._finite(inputs, "the input of the experts")
        self._all_finite, self._first = len(rows) == len(inputs), inputs.device
        if self.keep_rows:
            experts = routing.ids if len(rows) == len(inputs) else _without(inputs, routing.ids)
            self.rows = inputs.float(), experts
        if not len(rows):
            raise CalibrationError(
                f"layer {self.layer}: no token reaches the experts with finite activations",
                hint="the checkpoint is damaged, or the tokens are not text of its tokenizer",
            )
        self.arrays["gate_up.tokens"][0] = len(rows)
        self._gate_up_rows = rows

    def _finish_attention(self) -> None:
        """What attention saw, once the layer has run: to ask sooner would be to wait for it."""
        later, self.notes = self.notes, []
        for projection, parts in self._attended.items():
            row, name = ATTENTION[projection]
            rows, count = sum(part.rows for part in parts), int(np.sum(_fetched([p.count for p in parts])))
            self._note_bad(rows - count, rows, f"the input of {projection}")
            self.arrays["attn.counts"][row] = count
            total = reduce(np.add, _fetched([part.squares for part in parts]))
            self.arrays[f"{name}.diagonal"][:] = total / max(count, 1)
        self.notes += later

    def expert(self, layer: int, expert: int, tokens: Tensor, inputs: Tensor, product: Tensor) -> None:
        """Nothing here waits for a GPU, so that it is never idle between two experts."""
        seen = inputs if self._all_finite else self._finite(inputs, None)
        self._gate_up_seen[expert] = _GateUp(len(seen), squares(seen))
        self._waiting[expert] = product
        rows = sum(map(len, self._waiting.values()))
        if len(self._waiting) == self._at_once or rows >= self._at_once * CHUNK:
            self._add()

    def _add(self) -> None:
        """Add the second moments of what waits."""
        waiting, self._waiting = self._waiting, {}
        totals: dict[int, Tensor] = {}
        for experts in by_device(waiting):
            sizes = [len(waiting[e]) for e in experts]
            found, finite = second_moments([waiting[e] for e in experts], self._together)
            found = brought(found, self._first)
            self._down_seen.append(_Down(experts, sizes, finite, found.diagonal(dim1=1, dim2=2).clone()))
            totals |= zip(experts, found.unbind(), strict=True)
            if self.down != "pooled":
                self._keep(experts, found, torch.split(finite, sizes))
        for e in waiting:
            self._pooled = totals[e].clone() if self._pooled is None else self._pooled.add_(totals[e])

    def _keep(self, experts: Sequence[int], totals: Tensor, finite: Sequence[Tensor]) -> None:
        """Keep the moments of some experts, whose rows were `finite` or not."""
        pack = pack_correlation if self.down == "compact" else pack_moment
        for e, total, good in zip(experts, totals, finite, strict=True):
            if count := int(good.sum()):
                self.arrays["down.moment"][e] = pack((total / count).cpu().numpy())

    def finish(self) -> Arrays:
        """All tensors of the layer's file, once the layer has run; CalibrationError where down saw no row."""
        self._add()
        self._finish_attention()
        arrays = self.arrays
        if self._gate_up_rows is not None:
            moment = second_moment(self._gate_up_rows) / len(self._gate_up_rows)
            arrays["gate_up.moment"][:] = packed(moment).cpu().numpy()
        if self._gate_up_seen:
            self._finish_experts()
        count = int(arrays["down.counts"].sum())
        if not count or self._pooled is None:
            raise CalibrationError(f"layer {self.layer}: no expert's down projection saw finite activations")
        arrays["down.pooled"][:] = packed(self._pooled / count).cpu().numpy()
        return arrays

    def _finish_experts(self) -> None:
        """What is known of each expert's inputs, once all have run."""
        arrays, experts, seen = self.arrays, [*self._gate_up_seen], [*self._gate_up_seen.values()]
        above = np.array([s.count for s in seen])
        arrays["gate_up.counts"][experts] = above
        arrays["gate_up.diagonal"][experts] = _means(np.stack(_fetched([s.squares for s in seen])), above)
        finite = _fetched([some.finite for some in self._down_seen])
        sums = _fetched([some.squares for some in self._down_seen])
        rows: dict[int, int] = {}
        for some, good, energies in zip(self._down_seen, finite, sums, strict=True):
            below = np.array([run.sum() for run in np.split(good, np.cumsum(some.sizes)[:-1])])
            arrays["down.counts"][some.experts] = below
            arrays["down.diagonal"][some.experts] = _means(energies, below)
            rows |= zip(some.experts, some.sizes, strict=True)
        for e in experts:
            self._note_bad(rows[e] - int(arrays["down.counts"][e]), rows[e], f"expert {e}, the input of down")

    @property
    def unseen(self) -> list[int]:
        """Experts that no usable row of down was gathered for."""
        return [int(e) for e in np.flatnonzero(self.arrays["down.counts"] == 0)]

    def _finite(self, rows: Tensor, what: str | None) -> Tensor:
        """The rows whose energy is finite in f32; the others are counted in a note."""
        good = usable(rows)
        bad = len(rows) - int(good.sum())
        if what:
            self._note_bad(bad, len(rows), what)
        return rows[good[:, 0]] if bad else rows

    def _note_bad(self, bad: int, rows: int, what: str) -> None:
        if bad:
            self.notes.append(
                f"layer {self.layer}: {what}: {bad} of {rows} rows are not finite and were left out"
            )


@dataclass(frozen=True)
class _Attended:
    """What attention saw in some `rows` of an input: how many are finite, i64 [1], with the Σ x² f64 [K] of these."""

    rows: int
    count: Tensor
    squares: Tensor


@dataclass(frozen=True)
class _GateUp:
    """What gate and up of one expert saw, on its device: the number of tokens, and their Σ x² f64 [hidden]."""

    count: int
    squares: Tensor


@dataclass(frozen=True)
class _Down:
    """What down of some experts saw, of so many rows each: which of all rows are finite, bool [n, 1], and the Σ x² of
    these, f64 [experts, I].
    """

    experts: Sequence[int]
    sizes: Sequence[int]
    finite: Tensor
    squares: Tensor


def _fetched(values: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Tensors as arrays, in one copy from each device, which it waits for. Only their lengths may differ."""
    found: dict[int, NDArray[Any]] = {}
    for places in by_device(dict(enumerate(values))):
        joined = torch.cat([values[n] for n in places]).cpu().numpy()
        found |= zip(places, np.split(joined, np.cumsum([len(values[n]) for n in places])[:-1]), strict=True)
    return [found[n] for n in range(len(values))]


def _means(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums [n, K] over so many rows as means; 0 without rows."""
    return sums / np.maximum(counts, 1)[:, None]


def _without(inputs: Tensor, ids: Tensor) -> Tensor:
    """Experts i64 [n, k] of each token, NOBODY where its inputs [n, H] are not finite."""
    return ids.masked_fill(~usable(inputs), NOBODY)
