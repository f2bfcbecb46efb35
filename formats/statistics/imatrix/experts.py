"""A model's experts among the entries of an imatrix: which entry serves which projection, and whether all are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import ImatrixError
from ...minimax import PROJECTIONS, ModelConfig
from .entry import Imatrix, ImatrixEntry

GGUF_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
"""The names under which llama.cpp keeps the experts' matrices of a layer."""
_FUSED = ("ffn_gate_up_exps", "ffn_up_gate_exps")
_SERVED_BY = {
    "w1": (GGUF_NAMES["w1"], *_FUSED),
    "w2": (GGUF_NAMES["w2"],),
    "w3": (GGUF_NAMES["w3"], *_FUSED),
}
"""The entries that can serve a projection, the best first. Newer versions of llama.cpp and ik_llama.cpp keep gate and
up in one tensor: both see the same inputs, so its entry serves both."""
SHOWN = 8

_Fault = Literal["missing", "shape", "empty"]
_HINTS: dict[_Fault, str] = {
    "shape": "the imatrix is of another model; pass the one made from this checkpoint",
    "missing": "the imatrix is incomplete, or of another model; pass one that was made from this whole checkpoint",
    "empty": "the imatrix was made from too little text, or its sums overflowed; make it again from more text",
}


@dataclass(frozen=True)
class _Problem:
    kind: _Fault
    text: str


def expert_entry(
    imatrix: Imatrix, layer: int, projection: str, n_experts: int | None = None
) -> ImatrixEntry | None:
    """The statistics of one layer's experts for "w1", "w2" or "w3", row e for expert e; None if the file has none.

    A .dat does not say how many experts it holds, and neither does a GGUF file that was converted from one: `n_experts`
    splits its values, where they can be split.
    """
    found = [
        _split(entry, n_experts)
        for name in _SERVED_BY[projection]
        if (entry := imatrix.entries.get(entry_name(layer, name))) is not None
    ]
    return next((entry for entry in found if healthy(entry).any()), found[0] if found else None)


def entry_name(layer: int, tensor: str) -> str:
    """The name of one layer's entry."""
    return f"blk.{layer}.{tensor}.weight"


def _split(entry: ImatrixEntry, n_experts: int | None) -> ImatrixEntry:
    """The entry with one row for each expert, where the file keeps the experts' values in one row."""
    if n_experts is None or len(entry.counts) > 1 or entry.sum2_mean.size % n_experts:
        return entry
    if entry.counted and n_experts == 1:
        return entry
    rows = entry.sum2_mean.reshape(n_experts, -1)
    unused = (rows == rows[:, :1]).all(axis=1)
    counts = np.where(unused, 0.0, entry.counts[0])
    return ImatrixEntry(np.where(unused[:, None], np.float32(0), rows), counts, False)


def check_imatrix(imatrix: Imatrix, config: ModelConfig) -> None:
    """Raise ImatrixError unless every layer and projection has statistics of the model's shape, and some of use."""
    problems = list(islice(_problems(imatrix, config), SHOWN + 1))
    if problems:
        text = "; ".join(problem.text for problem in problems[:SHOWN])
        more = "; and more" if len(problems) > SHOWN else ""
        kinds = {problem.kind for problem in problems}
        hint = next(hint for kind, hint in _HINTS.items() if kind in kinds)
        raise ImatrixError(text + more, file=imatrix.path, hint=hint)


def _problems(imatrix: Imatrix, config: ModelConfig) -> Iterator[_Problem]:
    width = {"w1": config.hidden_size, "w2": config.intermediate_size, "w3": config.hidden_size}
    for layer in range(config.num_hidden_layers):
        for projection in PROJECTIONS:
            where = entry_name(layer, GGUF_NAMES[projection])
            entry = expert_entry(imatrix, layer, projection, config.num_local_experts)
            expected = (config.num_local_experts, width[projection])
            if entry is None:
                yield _Problem("missing", f"{where} is missing")
            elif entry.sum2_mean.shape != expected:
                found = _shape(entry.sum2_mean.shape)
                yield _Problem("shape", f"{where} has {found}, the model {_shape(expected)}")
            elif not healthy(entry).any():
                yield _Problem("empty", f"{where} has data for none of its experts")


def coverage(imatrix: Imatrix, config: ModelConfig) -> float:
    """Share of experts with usable data, over all layers and projections of an imatrix that fits the model."""
    found = [
        healthy(entry).mean()
        for layer in range(config.num_hidden_layers)
        for projection in PROJECTIONS
        if (entry := expert_entry(imatrix, layer, projection, config.num_local_experts)) is not None
    ]
    return float(np.sum(found) / (config.num_hidden_layers * len(PROJECTIONS)))


def healthy(entry: ImatrixEntry) -> NDArray[np.bool_]:
    """bool [n_mat]: counted, and at least one channel with a finite positive value."""
    usable = np.isfinite(entry.sum2_mean) & (entry.sum2_mean > 0)
    found: NDArray[np.bool_] = (entry.counts > 0) & usable.any(axis=1)
    return found


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} matrices of {shape[1]} channels"
