"""How work is cut for a cluster: a layer, or slices of one where there are more workers than layers keep busy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import TypeVar

from ..work_units import WorkUnit
from .job import Slice

P = TypeVar("P")

ROUNDS = 8
"""Slices per worker of a whole build: the last round leaves at most an eighth of the workers' time unused."""
FEWEST = 4
"""Units of a slice at least: every slice reads the samples of its layer and prepares its encoder anew."""
PATIENCE = 2.0
"""A slice that takes this many times as long as usual, when workers have nothing else to do, is done twice."""


def cut(
    order: Sequence[WorkUnit], todo: Sequence[WorkUnit], offset: int, workers: int, whole: bool = False
) -> tuple[Slice, ...]:
    """The units `todo` of an `order` as slices in that order, each of one layer; `offset` is where payloads begin.

    Layers are `whole` where each slice of one would fetch the layer's shards, or run the model through it, anew.
    """
    layers = max(1, len({unit.layer for unit in order}))
    pieces = 1 if whole else max(1, -(-ROUNDS * workers // layers))
    out: list[Slice] = []
    for layer, group in groupby(todo, lambda unit: unit.layer):
        units = list(group)
        all_of = sum(unit.layer == layer for unit in order) if pieces > 1 else len(units)
        size = max(FEWEST, -(-all_of // pieces))
        for piece in _pieces(units, size):
            out.append(
                Slice(
                    _name(layer, piece),
                    tuple((unit.key, offset + unit.start) for unit in piece),
                    sum(unit.weights for unit in piece),
                )
            )
    return tuple(out)


def _pieces(units: list[WorkUnit], size: int) -> Iterator[list[WorkUnit]]:
    for low in range(0, len(units), size):
        yield units[low : low + size]


def _name(layer: int | None, units: Sequence[WorkUnit]) -> str:
    """What Ray's dashboard shows of a slice."""
    where = "outside layers" if layer is None else f"layer {layer}"
    return f"{where}, {units[0].key} and {len(units) - 1} more" if len(units) > 1 else units[0].key


def overtaken(
    unfinished: Mapping[P, int], workers: int, idle_for: float, seconds: Sequence[float]
) -> tuple[P, ...]:
    """The pieces that idle workers begin once more, because those who have them are slow; the bytes are the same.

    `unfinished` has the number of tasks of each piece, fewer than there are `workers` for so many seconds; `seconds` is
    what finished pieces took.
    """
    free = workers - sum(unfinished.values())
    # Too few have finished to know what is usual: those outside layers are quick.
    if free <= 0 or len(seconds) < max(1, len(unfinished)) or idle_for < PATIENCE * median(seconds):
        return ()
    return tuple(each for each, tasks in unfinished.items() if tasks == 1)[:free]
