"""Second moments of one layer's activations, gathered while the reference forward runs it.

All sums are f64, in the order in which rows come, on any devices. Rows with a value whose square f32 cannot hold are
left out, and a note says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import repeat
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
from ...verify.model.device_weights import brought
from ...verify.model.reference import Observer, Routing
from ..spec.calibration_sizes import CHUNK

ATTENTION = {"q_proj": (0, "attn.in"), "o_proj": (1, "attn.out")}
"""Row of attn.counts and tensor of each input; k_proj and v_proj see what q_proj sees."""


class LayerMoments(Observer):
    """Gathers the tensors of one layer's file; `arrays` when the layer has run, `notes` on what was left out.

    With `keep_rows` the inputs of the experts are kept too, on their device. Experts may run on other devices; the sums
    of so many of them `at_once` wait there until they are added on the first one, in their order.
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
        self._gate_up: Tensor | None = None
        self._pooled: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._energies: list[Tensor] = []
        self._first = torch.device("cpu")
        self._all_finite = False
        self._attended: dict[str, list[_Attended]] = defaultdict(list)
        self._seen: dict[int, _Seen] = {}

    def dense(self, layer: int, projection: str, inputs: Tensor) -> None:
        if projection not in ATTENTION:
            return
        good = _usable(inputs)
        self._attended[projection].append(_Attended(len(inputs), good.sum(0), squares(inputs, good)))

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        self._finish_attention()
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
        self._gate_up = packed(second_moment(rows) / len(rows))

    def _finish_attention(self) -> None:
        """What attention saw, once the layer is behind it."""
        for projection, parts in self._attended.items():
            row, name = ATTENTION[projection]
            rows, count = sum(part.rows for part in parts), int(np.sum(_fetched([p.count for p in parts])))
            self._note_bad(rows - count, rows, f"the input of {projection}")
            self.arrays["attn.counts"][row] = count
            total = reduce(np.add, _fetched([part.squares for part in parts]))
            self.arrays[f"{name}.diagonal"][:] = total / max(count, 1)
        self._attended.clear()

    def expert(self, layer: int, expert: int, tokens: Tensor, inputs: Tensor, product: Tensor) -> None:
        """Nothing here waits for a GPU, so that it is never idle between two experts. Torch is called as seldom as can
        be: each call hands the interpreter on, which beside encoders takes longer than the work of a GPU.
        """
        seen = inputs if self._all_finite else self._finite(inputs, None)
        good = _usable(product)
        total = second_moment(torch.where(good, product, 0))
        self._seen[expert] = _Seen(len(seen), squares(seen), good)
        if self.down != "pooled" and (count := int(good.sum())):
            self.arrays["down.moment"][expert] = (
                pack_correlation if self.down == "compact" else pack_moment
            )((total / count).cpu().numpy())
        self._waiting.append(total)
        if len(self._waiting) == self._at_once:
            self._add()

    def _add(self) -> None:
        """Add the sums that wait, and keep the diagonal of each."""
        if not self._waiting:
            return
        there = [brought(total, self._first) for total in self._waiting]
        self._waiting.clear()
        self._energies.append(torch.stack([total.diagonal() for total in there]))
        for total in there:
            self._pooled = total if self._pooled is None else self._pooled.add_(total)

    def finish(self) -> Arrays:
        """All tensors of the layer's file, once the layer has run; CalibrationError where down saw no row."""
        arrays, order, seen = self.arrays, [*self._seen], [*self._seen.values()]
        self._add()
        if self._gate_up is not None:
            arrays["gate_up.moment"][:] = self._gate_up.cpu().numpy()
        if order:
            above = np.array([s.gate_up_count for s in seen])
            finite = _fetched([s.finite for s in seen])
            below = np.array([run.sum() for run in finite])
            arrays["gate_up.counts"][order], arrays["down.counts"][order] = above, below
            arrays["gate_up.diagonal"][order] = _means(
                np.stack(_fetched([s.gate_up_squares for s in seen])), above
            )
            arrays["down.diagonal"][order] = _means(torch.cat(self._energies).cpu().numpy(), below)
            for e, run, count in zip(order, finite, below.tolist(), strict=True):
                self._note_bad(len(run) - count, len(run), f"expert {e}, the input of down")
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
class _Seen:
    """What one expert saw, on its device: the number of tokens of gate and up with their Σ x² f64 [hidden], and which
    rows of down are `finite`, bool [n, 1].
    """

    gate_up_count: int
    gate_up_squares: Tensor
    finite: Tensor


def _fetched(values: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Tensors as arrays, in one copy from each device, which it waits for. Only their lengths may differ."""
    by_device: dict[torch.device, list[int]] = {}
    for n, value in enumerate(values):
        by_device.setdefault(value.device, []).append(n)
    found: dict[int, NDArray[Any]] = {}
    for places in by_device.values():
        joined = torch.cat([values[n] for n in places]).cpu().numpy()
        found |= zip(places, np.split(joined, np.cumsum([len(values[n]) for n in places])[:-1]), strict=True)
    return [found[n] for n in range(len(values))]


def _means(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums [n, K] over so many rows as means; 0 without rows."""
    return sums / np.maximum(counts, 1)[:, None]


def _usable(rows: Tensor) -> Tensor:
    """Whether f32 holds the energy of each row of f32 [n, K], and so its root, bool [n, 1]."""
    finite: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True) < torch.inf
    return finite


def _chunks(rows: Tensor) -> Sequence[Tensor]:
    """Some rows after others."""
    return torch.split(rows, CHUNK) if len(rows) > CHUNK else (rows,)


def _without(inputs: Tensor, ids: Tensor) -> Tensor:
    """Experts i64 [n, k] of each token, NOBODY where its inputs [n, H] are not finite."""
    return ids.masked_fill(~_usable(inputs), NOBODY)


def packed(moment: Tensor) -> Tensor:
    """What `pack_moment` makes of a moment f64 [k, k], where that is: f32 [k(k+1)/2]."""
    rows, columns = torch.triu_indices(len(moment), len(moment), device=moment.device)
    return moment.float()[rows, columns]


def second_moment(rows: Tensor) -> Tensor:
    """Σ x xᵀ over rows [n, K], f64 [K, K], where the rows are. Only what is not below the diagonal is used of it."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for chunk in _chunks(rows):
        wide = chunk.double()
        total.addmm_(wide.T, wide)
    return total


def squares(rows: Tensor, good: Tensor | None = None) -> Tensor:
    """Σ x² over rows [n, K], or over those that are `good`, bool [n, 1]; f64 [K], where the rows are."""
    parts: Iterable[Tensor] = _chunks(rows)
    if good is not None:
        parts = map(torch.where, _chunks(good), parts, repeat(rows.new_zeros(())))
    return reduce(torch.add, (torch.float_power(part, 2).sum(0) for part in parts))
