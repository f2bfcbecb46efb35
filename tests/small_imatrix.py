"""An imatrix for the smallest checkpoint of the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mq_quant.formats.statistics.imatrix import ImatrixEntry, write_imatrix


def save_imatrix(
    path: Path, seed: int = 0, layers: int = 2, experts: int = 3, width: int = 256, broken: bool = False
) -> Path:
    """An imatrix for small_model.CONFIG whose channels differ in energy by orders of magnitude.

    Where it is `broken`, it has what real ones have: an infinity, a NaN, and an expert that no token reached.
    """
    random = np.random.default_rng(seed)
    names = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    entries = {
        f"blk.{layer}.{name}.weight": ImatrixEntry(
            np.exp(random.normal(0, 1.5, (experts, width))).astype(np.float32), np.full(experts, 500.0)
        )
        for layer in range(layers)
        for name in names
    }
    if broken:
        entries["blk.1.ffn_down_exps.weight"].sum2_mean[0, :2] = np.inf, np.nan
        unseen = entries["blk.0.ffn_up_exps.weight"]
        unseen.sum2_mean[2], unseen.counts[2] = 0, 0
    write_imatrix(path, entries, ["random"], 1, 512)
    return path
