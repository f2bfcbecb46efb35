"""Units of work: the pieces of the file that are encoded, written, noted in the journal and resumed as one.

A unit is one run of bytes: a tensor, some rows of a large one, or the three matrices of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ...formats.minimax import PROJECTIONS
from ..spec.plan import ROW_WEIGHTS, PlannedTensor
from .build_spec import BuildSpec


@dataclass(frozen=True)
class WorkUnit:
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
        """Whether it is a layer's AWQ scale, which no tensor of the source holds."""
        return self.tensors[0].spec is None


def work_order(spec: BuildSpec) -> tuple[WorkUnit, ...]:
    """The whole file as units, in the order in which they are encoded: layer by layer, inside a layer shard by shard.

    Each layer's AWQ scale stays before its experts.
    """
    number = {shard: i for i, shard in enumerate(spec.source.shards)}
    tensors = spec.source.tensors
    return shard_by_shard(file_order(spec.plan.tensors), lambda name: number[tensors[name].shard])


def file_order(tensors: Sequence[PlannedTensor]) -> tuple[WorkUnit, ...]:
    """The file as units, in the order of their bytes, without holes."""
    return tuple(unit for _, same in groupby(tensors, _owner) for unit in _split(tuple(same)))


def _owner(t: PlannedTensor) -> tuple[int | None, int] | str:
    spec = t.spec
    return (spec.layer, spec.expert) if spec and spec.expert is not None else t.name


def _split(tensors: tuple[PlannedTensor, ...]) -> Iterator[WorkUnit]:
    first, spec = tensors[0], tensors[0].spec
    if spec and spec.expert is not None:
        assert tuple(t.spec.projection for t in tensors if t.spec) == PROJECTIONS
        key = f"layer {spec.layer} expert {spec.expert}"
        nbytes, weights = sum(t.nbytes for t in tensors), sum(t.weights for t in tensors)
        yield WorkUnit(key, first.start, nbytes, weights, tensors)
    elif spec and spec.role in ("embed", "lm_head") and first.weights > ROW_WEIGHTS:
        count, width = first.shape
        step, row_bytes = ROW_WEIGHTS // width, first.nbytes // count
        for low in range(0, count, step):
            n = min(step, count - low)
            at = first.start + low * row_bytes
            yield WorkUnit(f"{first.name}[{low}]", at, n * row_bytes, n * width, tensors, (low, low + n))
    else:
        yield WorkUnit(first.name, first.start, first.nbytes, first.weights, tensors)


def shard_by_shard(units: Sequence[WorkUnit], shard_of: Callable[[str], int]) -> tuple[WorkUnit, ...]:
    """Units in file order, the experts of each layer sorted by the last shard that they need.

    `shard_of` numbers the source's shards.
    """

    def last_shard(unit: WorkUnit) -> int:
        return max((shard_of(t.name) for t in unit.tensors if t.spec), default=-1)

    out: list[WorkUnit] = []
    for _, group in groupby(units, lambda unit: (unit.layer, unit.expert is not None)):
        same = list(group)
        out += sorted(same, key=last_shard) if same[0].expert is not None else same
    return tuple(out)


def whole_layers(order: Sequence[WorkUnit], kept: frozenset[str]) -> frozenset[str]:
    """The units that may be kept of an interrupted build: those of layers that are complete, and those of none.

    A layer is tuned as a whole, so what is left of an incomplete one is made again; the bytes come out the same.
    """
    broken = {unit.layer for unit in order if unit.key not in kept} - {None}
    return frozenset(unit.key for unit in order if unit.key in kept and unit.layer not in broken)
