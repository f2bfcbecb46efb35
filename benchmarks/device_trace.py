"""What GPUs do over time, as a picture: the share of each 50 ms in which a kernel ran, or several at once.

`layer_pass.py --trace FILE.png` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

F64 = NDArray[np.float64]
BIN = 0.05


@dataclass(frozen=True)
class Kernels:
    """When each kernel of one GPU ran, in seconds f64 [n]."""

    begin: F64
    end: F64

    def running(self, least: int) -> F64:
        """The share f64 [bins] of each BIN in which at least so many kernels ran."""
        times = np.concatenate([self.begin, self.end])
        order = np.argsort(times, kind="stable")
        change = np.concatenate([np.ones(len(self.begin)), -np.ones(len(self.end))])[order]
        many = np.cumsum(change) >= least
        edges = BIN * np.arange(math.ceil(times.max() / BIN - 1e-9) + 1)
        spent = np.concatenate([[0.0], np.cumsum(np.diff(times[order]) * many[:-1])])
        return np.diff(np.interp(edges, times[order], spent)) / BIN


def kernels_of(profile: torch.profiler.profile) -> dict[int, Kernels]:
    """The kernels in a profile by the number of their GPU; times begin with the first of all."""
    found: dict[int, list[tuple[int, int]]] = {}
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if "CUDA" in str(event.device_type()):
            begin = event.start_ns()
            found.setdefault(event.device_index(), []).append((begin, begin + event.duration_ns()))
    first = min((spans[0][0] for spans in map(sorted, found.values())), default=0)
    arrays = {gpu: (np.array(spans, np.int64) - first) / 1e9 for gpu, spans in sorted(found.items())}
    return {gpu: Kernels(spans[:, 0], spans[:, 1]) for gpu, spans in arrays.items()}


def draw(kernels: dict[int, Kernels], title: str, path: Path) -> float:
    """Draw what ran to a picture; returns the share of the time in which a GPU ran, in the mean."""
    figure = Figure(figsize=(9, 1.2 + 1.4 * len(kernels)), layout="constrained")
    busy = []
    for gpu, axes in zip(kernels, np.atleast_1d(figure.subplots(len(kernels), 1, sharex=True)), strict=True):
        shares = {least: kernels[gpu].running(least) for least in (1, 2, 4)}
        busy.append(shares[1].mean())
        seconds = BIN * np.arange(len(shares[1]))
        for least, shade in zip(shares, ("#c6dbef", "#6baed6", "#08519c"), strict=True):
            axes.fill_between(seconds, shares[least], step="post", color=shade, label=f"{least} or more")
        axes.set(ylim=(0, 1), ylabel=f"GPU {gpu}", xlim=(0, seconds[-1]))
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    figure.savefig(path, dpi=120)
    return float(np.mean(busy))
