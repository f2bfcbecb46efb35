"""Units of work: the pieces of the file that are encoded, written, journalled and resumed as one.

A unit is one run of bytes: a tensor, some rows of a large one, or the three matrices of one expert. Depends on plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ...formats.minimax import PROJECTIONS
from ..spec.plan import ROW_WEIGHTS, PlannedTensor


@dataclass(frozen=True)
class Unit:
    """Bytes [start, start + nbytes) of the payloads; `rows` where they are a part of one tensor."""

    key: str
    start: int
    nbytes: int
    weights: int
    tensors: tuple[PlannedTensor, ...]
    rows: tuple[int, int] | None = None

    @property
    def layer(self) -> int | None:
        return self.tensors[0].layer

    @property
    def expert(self) -> int | None:
        spec = self.tensors[0].spec
        return spec.expert if spec else None

    @property
    def is_last(self) -> bool:
        """Whether its tensors are complete with it."""
        return self.start + self.nbytes == self.tensors[-1].start + self.tensors[-1].nbytes

    @property
    def is_sidecar(self) -> bool:
        return self.tensors[0].spec is None


def units(tensors: Sequence[PlannedTensor]) -> tuple[Unit, ...]:
    """The file as units, in file order, without holes."""
    return tuple(unit for _, same in groupby(tensors, _owner) for unit in _split(tuple(same)))


def _owner(t: PlannedTensor) -> tuple[int | None, int] | str:
    spec = t.spec
    return (spec.layer, spec.expert) if spec and spec.expert is not None else t.name


def _split(tensors: tuple[PlannedTensor, ...]) -> Iterator[Unit]:
    first, spec = tensors[0], tensors[0].spec
    if spec and spec.expert is not None:
        assert tuple(t.spec.projection for t in tensors if t.spec) == PROJECTIONS
        key = f"layer {spec.layer} expert {spec.expert}"
        yield Unit(key, first.start, sum(t.nbytes for t in tensors), sum(t.weights for t in tensors), tensors)
    elif spec and spec.role in ("embed", "lm_head") and first.weights > ROW_WEIGHTS:
        count, width = first.shape
        step, row_bytes = ROW_WEIGHTS // width, first.nbytes // count
        for low in range(0, count, step):
            n = min(step, count - low)
            at = first.start + low * row_bytes
            yield Unit(f"{first.name}[{low}]", at, n * row_bytes, n * width, tensors, (low, low + n))
    else:
        yield Unit(first.name, first.start, first.nbytes, first.weights, tensors)


def work_order(all_units: Sequence[Unit], shard_of: Callable[[str], int]) -> list[Unit]:
    """The order in which units are encoded: layer by layer as in the file, and inside a layer shard by shard.

    `shard_of` numbers the source's shards; each layer's sidecar stays before its experts.
    """

    def last_shard(unit: Unit) -> int:
        return max((shard_of(t.name) for t in unit.tensors if t.spec), default=-1)

    out: list[Unit] = []
    for _, group in groupby(all_units, lambda unit: (unit.layer, unit.expert is not None)):
        same = list(group)
        out += sorted(same, key=last_shard) if same[0].expert is not None else same
    return out
