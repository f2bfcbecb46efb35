"""One imatrix in memory: its entries by name, each read from the file when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import ImatrixError

_COPIED = re.compile(r"[^#]*#(?P<name>.+)#\d+")
_DERIVED = re.compile(r"(?: \((?:reshaped|view|cont|transposed|permuted)\))+$")
_BARE = re.compile(r"blk\.\d+\.[a-z_]+")


@dataclass(frozen=True)
class ImatrixEntry:
    """One weight's statistics: `sum2_mean` f32 [n_mat, K] = E[x²] per channel, 0 where nothing was counted.

    `counts` f64 [n_mat] are the tokens behind each row. Where `counted` is False the file has none per matrix (.dat):
    then they are the file's number of calls, and 0 for rows whose values are all the same, as unused experts have.
    """

    sum2_mean: NDArray[np.float32]
    counts: NDArray[np.float64]
    counted: bool = True


Loader = Callable[[], ImatrixEntry]


class Entries(Mapping[str, ImatrixEntry]):
    """Entries by name, each computed from the file every time it is asked for."""

    def __init__(self, loaders: Mapping[str, Loader]) -> None:
        self._loaders = loaders

    def __getitem__(self, name: str) -> ImatrixEntry:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


@dataclass(frozen=True)
class Imatrix:
    """One imatrix file; `entries` maps llama.cpp weight names such as `blk.0.ffn_up_exps.weight`, read on access."""

    path: Path
    kind: Literal["gguf", "dat"]
    datasets: tuple[str, ...]
    chunk_count: int
    sha256: str
    entries: Mapping[str, ImatrixEntry]


def weight_name(name: str) -> str:
    """The weight that an entry speaks of.

    The tools that write imatrices name an entry after a tensor of their computation. That may be a copy on a device
    (`CUDA0#blk.0.attn_k.weight#0`) or another view of the weight (`blk.0.attn_k.weight (reshaped)`). Some leave the
    ending `.weight` out.
    """
    copied = _COPIED.fullmatch(name)
    weight = _DERIVED.sub("", copied["name"] if copied else name)
    return f"{weight}.weight" if _BARE.fullmatch(weight) else weight


def add_entry(loaders: dict[str, Loader], name: str, load: Loader, path: Path) -> None:
    """Add one entry under its weight's name; ImatrixError where the file has one for that weight already."""
    weight = weight_name(name)
    if weight in loaders:
        raise ImatrixError(
            "appears twice", file=path, tensor=weight, hint="use an imatrix that names it once"
        )
    loaders[weight] = load


def mean_entry(sums: NDArray[np.float32], counts: NDArray[np.float64], counted: bool = True) -> ImatrixEntry:
    """The entry of sums f32 [n, K] over counts f64 [n], divided in f64 and rounded to f32; unusable counts become 0."""
    counts = np.where(np.isfinite(counts) & (counts > 0), counts, 0.0)
    with np.errstate(all="ignore"):
        mean = (sums.astype(np.float64) / np.where(counts > 0, counts, 1.0)[:, None]).astype(np.float32)
    mean[counts == 0] = 0
    return ImatrixEntry(mean, counts, counted)
