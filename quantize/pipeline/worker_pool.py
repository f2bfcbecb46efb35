"""Workers: units of work run on a pool of threads and are handed over in the order of the work list.

One encoder per layer fixes the layer's AWQ scale before its experts are encoded. Several files of one source are
encoded in step: what they have in common is made once for a unit. The bytes are a pure function of the spec: neither
the number of threads, nor the order of the work, nor the other files change one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import Format, Q8Format
from ...formats.errors import MqError
from ...formats.minimax import PROJECTIONS
from ..encode.blas import one_blas_thread
from ..encode.encoders import CPU, Encoder
from ..encode.layer_encoder import EncodedExpert, LayerEncoder, attempt
from ..encode.once import once_for
from ..encode.overflow import encode_tensor
from ..spec.hooks import nothing
from .build_spec import BuildSpec
from .turns import Turns
from .work_units import WorkUnit

AHEAD = 2
"""Units in flight per worker: one that is encoded and one that waits."""
PREPARE = 4
"""A layer's encoder is prepared this many units per worker before the layer's first unit."""

U8 = NDArray[np.uint8]
UnitHook = Callable[[WorkUnit], None]


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
class Workers:
    """How units are run, in `turns` by layer where they are given; `on_begin(unit)` runs on the worker's thread before
    the unit is encoded.
    """

    jobs: int = 1
    encoder: Encoder = CPU
    on_begin: UnitHook = nothing
    turns: Turns | None = None


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

    def without(self, gone: Container[int]) -> Step:
        """The step of the other files."""
        return Step({n: unit for n, unit in self.units.items() if n not in gone})


def in_step(order: Sequence[WorkUnit], todo: Mapping[int, Sequence[WorkUnit]]) -> list[Step]:
    """What is left to do of each file as steps, in the order that all files have in common."""
    left = {n: {unit.key: unit for unit in units} for n, units in todo.items()}
    steps = (Step({n: units[each.key] for n, units in left.items() if each.key in units}) for each in order)
    return [step for step in steps if step.units]


@dataclass
class Layers:
    """The encoders of the layers in work, each layer's prepared on the pool ahead of its units, for the files that have
    something to do there.
    """

    specs: Mapping[int, BuildSpec]
    files: Mapping[int, Container[int]]
    gone: Container[int]
    pool: ThreadPoolExecutor
    encoder: Encoder
    ready: dict[int, Future[dict[int, LayerEncoder]]] = field(default_factory=dict)

    def of(self, unit: WorkUnit) -> Future[dict[int, LayerEncoder]] | None:
        """The encoders that a unit needs, their preparation begun if it was not; None for tensors outside experts."""
        layer = unit.layer
        if layer is None or not (unit.expert is not None or unit.is_sidecar):
            return None
        if layer not in self.ready:
            specs = {
                n: spec for n, spec in self.specs.items() if n in self.files[layer] and n not in self.gone
            }
            self.ready[layer] = self.pool.submit(prepare_layers, specs, layer, self.encoder)
        return self.ready[layer]

    def drop_before(self, layer: int) -> None:
        for old in [known for known in self.ready if known < layer]:
            del self.ready[old]


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


def encode_unit(spec: BuildSpec, unit: WorkUnit, encoder: LayerEncoder | None) -> Encoded:
    """The bytes of one unit, a pure function of the spec."""
    done = encode_step({0: spec}, Step({0: unit}), None if encoder is None else {0: encoder})[0]
    if isinstance(done, MqError):
        raise done
    return done


def encode_step(
    specs: Mapping[int, BuildSpec], step: Step, encoders: Mapping[int, LayerEncoder] | None
) -> dict[int, Encoded | MqError]:
    """The bytes of a step's units by the numbers of their files, or the error that prevents those of one file.

    Raises what the source raises.
    """
    unit, units = step.unit, step.units
    if encoders is None:
        return _plain(specs, step)
    if unit.expert is None:
        return {n: Encoded(encoders[n].sidecar(), encoders[n].report()) for n in units}
    mine = [encoders[n] for n in units]
    source = specs[next(iter(units))].source
    results = type(mine[0]).encode_together(mine, unit.expert, source)
    return {
        n: done if isinstance(done, MqError) else _expert(encoders[n], unit.expert, done)
        for n, done in zip(units, results, strict=True)
    }


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


def run_units(
    spec: BuildSpec, todo: Sequence[WorkUnit], deliver: Callable[[WorkUnit, Encoded], None], workers: Workers
) -> None:
    """Encode units on the workers' threads and deliver each on the calling thread, in the given order.

    Few units are in flight at a time. Raises what a hook, the source or the encoder raises.
    """

    def take(_: int, unit: WorkUnit, done: Encoded | MqError) -> None:
        if isinstance(done, MqError):
            raise done
        deliver(unit, done)

    run_steps({0: spec}, [Step({0: unit}) for unit in todo], take, workers)


@one_blas_thread()
def run_steps(
    specs: Mapping[int, BuildSpec],
    todo: Sequence[Step],
    deliver: Callable[[int, WorkUnit, Encoded | MqError], None],
    workers: Workers,
    gone: Container[int] = (),
) -> None:
    """As `run_units` for several files of one source and importance: deliver(n, unit, done) is called for each file of
    each step.

    What prevents the bytes of one file is delivered in their place. Nothing more is done for files that are `gone`,
    which may change meanwhile. Raises what a hook or the source raises.
    """
    source = next(iter(specs.values())).source
    source.schedule([t.name for step in todo for t in step.unit.tensors if t.spec and step.unit.is_last])
    jobs, turns = workers.jobs, workers.turns
    files: dict[int, set[int]] = defaultdict(set)
    for step in todo:
        if step.unit.layer is not None:
            files[step.unit.layer].update(step.units)
    with ThreadPoolExecutor(jobs, thread_name_prefix="encode") as pool:
        layers = Layers(specs, files, gone, pool, workers.encoder)
        pending: deque[tuple[Step, Future[dict[int, Encoded | MqError]]]] = deque()

        def work(step: Step, coming: Future[dict[int, LayerEncoder]] | None) -> dict[int, Encoded | MqError]:
            encoders = coming.result() if coming else None
            left = step.without(gone)
            for unit in left.units.values():
                workers.on_begin(unit)
            return encode_step(specs, left, encoders) if left.units else {}

        def finish() -> None:
            step, future = pending.popleft()
            for n, done in future.result().items():
                if n not in gone:
                    deliver(n, step.units[n], done)
            unit = step.unit
            if unit.layer is not None:
                layers.drop_before(unit.layer)
                if turns is not None:
                    turns.end_before(unit.layer)
            for tensor in unit.tensors:
                if tensor.spec and unit.is_last:
                    source.release(tensor.name)

        def begin(layer: int) -> None:
            assert turns is not None
            while pending and not turns.under_way(layer):
                finish()
            if not turns.under_way(layer):
                layers.drop_before(layer)
                turns.begin(layer)

        begun: int | None = None
        try:
            for step, later in zip(todo, [*todo[PREPARE * jobs :], *todo[-PREPARE * jobs :]], strict=False):
                unit = step.unit
                if not step.without(gone).units:
                    continue
                if turns is not None and unit.layer is not None and unit.layer != begun:
                    begin(unit.layer)
                    begun = unit.layer
                # Deadlock guard: a layer's encoder is submitted before units that wait for it, or all threads could be
                # waiting.
                encoders = layers.of(unit)
                ahead = later.unit.layer
                if turns is None or ahead == begun or (ahead is not None and turns.under_way(ahead)):
                    layers.of(later.unit)
                pending.append((step, pool.submit(work, step, encoders)))
                if len(pending) > AHEAD * jobs:
                    finish()
            while pending:
                finish()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
