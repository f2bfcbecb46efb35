"""The bytes of single units of work: what is encoded for one file, or for several files of one source in step.

One encoder per layer fixes the layer's AWQ scale before its experts are encoded. What several files have in common is
made once for a unit; the bytes of each are a pure function of its spec.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import Format, Q8Format
from ...formats.errors import MqError
from ...formats.minimax import PROJECTIONS
from ..encode.encoders import CPU, Encoder
from ..encode.layer_encoder import EncodedExpert, LayerEncoder
from ..encode.once import attempt, once_for
from ..encode.overflow import encode_tensor
from .build_spec import BuildSpec
from .work_units import WorkUnit

U8 = NDArray[np.uint8]

FILES = 2
"""Files that have blocks of the full size; more files have smaller ones, so that no more matrices wait at a time."""


@dataclass(frozen=True)
class Encoded:
    """A finished unit: its bytes, for a layer's AWQ scale, or its first expert where there is none, what the encoder
    reports of the layer, for an expert what its rounding fell back on.

    Where layers are tuned, `weights` f32 are those of a matrix that is tuned before it is rounded, and the last unit of
    a layer says in `stream` what the file's own stream behind that layer is.
    """

    payload: U8
    report: dict[str, Any] | None = None
    notes: Mapping[str, Sequence[str]] | None = None
    weights: NDArray[np.float32] | None = None
    stream: Mapping[str, Any] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What the journal keeps of it besides the checksum."""
        kept = {"report": self.report, "notes": self.notes, "stream": self.stream}
        return {key: value for key, value in kept.items() if value}


@dataclass(frozen=True)
class Step:
    """One unit of every file that still needs it, by the number of the file's spec.

    In all of them it has the same key, the same tensors and the same rows.
    """

    units: Mapping[int, WorkUnit]

    @property
    def unit(self) -> WorkUnit:
        """The unit of the first of these files."""
        return next(iter(self.units.values()))

    def goes_with(self, other: Step) -> bool:
        """Whether both are experts of one layer, and of the same files."""
        mine, theirs = self.unit, other.unit
        experts = mine.expert is not None and theirs.expert is not None
        return experts and mine.layer == theirs.layer and self.units.keys() == other.units.keys()

    def without(self, gone: Container[int]) -> Step:
        """The step of the other files."""
        return Step({n: unit for n, unit in self.units.items() if n not in gone})


def in_step(order: Sequence[WorkUnit], todo: Mapping[int, Sequence[WorkUnit]]) -> list[Step]:
    """What is left to do of each file as steps, in the order that all files have in common."""
    left = {n: {unit.key: unit for unit in units} for n, units in todo.items()}
    steps = (Step({n: units[each.key] for n, units in left.items() if each.key in units}) for each in order)
    return [step for step in steps if step.units]


def prepare_layer(spec: BuildSpec, layer: int, encoder: Encoder = CPU) -> LayerEncoder:
    """The encoder of one layer, its AWQ scale fixed from the weights that it asks to see."""
    return prepare_layers({0: spec}, layer, encoder)[0]


def prepare_layers(
    specs: Mapping[int, BuildSpec], layer: int, encoder: Encoder = CPU
) -> dict[int, LayerEncoder]:
    """The encoders of one layer for files of one source and importance; what these have in common is made once."""
    if not specs:
        return {}
    first = next(iter(specs.values()))
    importance = first.importance.layer(layer) if first.importance else None
    made = {
        n: _kind(spec)(spec.plan.config, layer, importance, _formats(spec, layer), spec.rounding, encoder)
        for n, spec in specs.items()
    }
    needed = dict.fromkeys(name for each in made.values() for name in each.needs_samples())
    samples = {name: first.source.weight(name) for name in needed}
    once = once_for(made)
    for each in made.values():
        each.prepare(samples, once)
    return made


def _formats(spec: BuildSpec, layer: int) -> dict[str, Format]:
    """The formats of a layer's experts, by projection."""
    return {
        t.spec.projection: t.format
        for t in spec.plan.tensors
        if t.layer == layer and t.spec and t.spec.projection and t.spec.expert == 0
    }


def _kind(spec: BuildSpec) -> type[LayerEncoder]:
    """Who encodes layers: torch is loaded where it gathered what experts see on a device."""
    if spec.gathered is None or not spec.gathered.stays:
        return LayerEncoder
    from ..encode.on_device.layer import DeviceLayerEncoder

    return DeviceLayerEncoder


def in_blocks(specs: Mapping[int, BuildSpec], steps: Sequence[Step]) -> list[tuple[Step, ...]]:
    """The steps in their order: experts of a layer that the same files need are encoded together, as many as who
    encodes them takes at a time, but fewer for many files: an expert's matrices wait for the others' in each of them.
    Every other step is alone.
    """
    most = max(_kind(spec).together for spec in specs.values())
    blocks: list[list[Step]] = []
    for step in steps:
        last = blocks[-1] if blocks else []
        if last and len(last) < min(most, FILES * most // len(step.units)) and step.goes_with(last[0]):
            last.append(step)
        else:
            blocks.append([step])
    return [tuple(block) for block in blocks]


def encode_block(
    specs: Mapping[int, BuildSpec], block: Sequence[Step], encoders: Mapping[int, LayerEncoder] | None
) -> list[dict[int, Encoded | MqError]]:
    """For each step of a block the bytes of its units by the numbers of their files, or the error that prevents those
    of one file.

    Raises what the source raises.
    """
    if encoders is None:
        return [_plain(specs, step) for step in block]
    experts = [step.unit.expert for step in block if step.unit.expert is not None]
    units = block[0].units
    if not experts:
        return [{n: Encoded(encoders[n].sidecar(), encoders[n].report()) for n in units}]
    mine = [encoders[n] for n in units]
    source = specs[next(iter(units))].source
    together = type(mine[0]).encode_together(mine, experts, source)
    return [
        {
            n: done if isinstance(done, MqError) else _expert(encoders[n], expert, done)
            for n, done in zip(units, results, strict=True)
        }
        for expert, results in zip(experts, together, strict=True)
    ]


def _expert(encoder: LayerEncoder, expert: int, done: EncodedExpert) -> Encoded:
    # Without importances no AWQ scale carries the report.
    first = encoder.importance is None and expert == 0
    payload = np.concatenate([done.payloads[p] for p in PROJECTIONS])
    return Encoded(payload, encoder.report() if first else None, done.notes)


def _plain(specs: Mapping[int, BuildSpec], step: Step) -> dict[int, Encoded | MqError]:
    """A tensor outside the experts, or some rows of it, read once for all files."""
    (tensor,) = step.unit.tensors
    name, rows = tensor.name, step.unit.rows
    source = specs[next(iter(step.units))].source
    weights = source.rows(name, *rows) if rows else source.weight(name)
    once = once_for(step.units)

    def encode(n: int, fmt: Format) -> Encoded:
        spec, fit = specs[n], specs[n].rounding.fit
        payload = once.one((fmt.name, fit), partial(encode_tensor, name, weights, fmt, fit))
        tuned = spec.tuning is not None and step.unit.layer is not None and isinstance(fmt, Q8Format)
        return Encoded(payload, weights=weights if tuned else None)

    return {n: attempt(partial(encode, n, unit.tensors[0].format)) for n, unit in step.units.items()}
