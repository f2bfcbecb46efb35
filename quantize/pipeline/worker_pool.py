"""Workers: units of work run on a pool of threads and are handed over in the order of the work list.

One encoder per layer fixes the layer's AWQ scale before its experts are encoded. The bytes are a pure function of the
spec: neither the number of threads nor the order of the work changes one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import Q8Format
from ...formats.minimax import PROJECTIONS
from ..encode.blas import one_blas_thread
from ..encode.encoders import CPU, Encoder
from ..encode.layer_encoder import LayerEncoder
from ..encode.overflow import encode_tensor
from ..spec.hooks import nothing
from .build_spec import BuildSpec
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
    """How units are run. `before_layer(layer)`, where given, runs on the calling thread when everything before the
    layer is delivered and nothing of it is begun; `on_begin(unit)` on the worker's thread before the unit is encoded.
    """

    jobs: int = 1
    encoder: Encoder = CPU
    on_begin: UnitHook = nothing
    before_layer: Callable[[int], None] | None = None


@dataclass
class Layers:
    """The encoders of the layers in work, each prepared on the pool ahead of its units."""

    spec: BuildSpec
    pool: ThreadPoolExecutor
    encoder: Encoder
    ready: dict[int, Future[LayerEncoder]] = field(default_factory=dict)

    def of(self, unit: WorkUnit) -> Future[LayerEncoder] | None:
        """The encoder that a unit needs, its preparation begun if it was not; None for tensors outside experts."""
        layer = unit.layer
        if layer is None or not (unit.expert is not None or unit.is_sidecar):
            return None
        if layer not in self.ready:
            self.ready[layer] = self.pool.submit(prepare_layer, self.spec, layer, self.encoder)
        return self.ready[layer]

    def drop_before(self, layer: int) -> None:
        for old in [known for known in self.ready if known < layer]:
            del self.ready[old]


def prepare_layer(spec: BuildSpec, layer: int, encoder: Encoder = CPU) -> LayerEncoder:
    """The encoder of one layer, its AWQ scale fixed from the weights that it asks to see."""
    formats = {
        t.spec.projection: t.format
        for t in spec.plan.tensors
        if t.layer == layer and t.spec and t.spec.projection and t.spec.expert == 0
    }
    importance = spec.importance.layer(layer) if spec.importance else None
    made = _kind(spec)(spec.plan.config, layer, importance, formats, spec.rounding, encoder)
    made.prepare({name: spec.source.weight(name) for name in made.needs_samples()})
    return made


def _kind(spec: BuildSpec) -> type[LayerEncoder]:
    """Who encodes layers: torch is loaded where it gathered what experts see on a device."""
    if spec.gathered is None or not spec.gathered.stays:
        return LayerEncoder
    from ..encode.on_device.layer import DeviceLayerEncoder

    return DeviceLayerEncoder


def encode_unit(spec: BuildSpec, unit: WorkUnit, encoder: LayerEncoder | None) -> Encoded:
    """The bytes of one unit, a pure function of the spec."""
    if encoder is None:
        (tensor,) = unit.tensors
        name, rows = tensor.name, unit.rows
        weights = spec.source.rows(name, *rows) if rows else spec.source.weight(name)
        payload = encode_tensor(name, weights, tensor.format, spec.rounding.fit)
        tuned = spec.tuning is not None and unit.layer is not None and isinstance(tensor.format, Q8Format)
        return Encoded(payload, weights=weights if tuned else None)
    if unit.expert is None:
        return Encoded(encoder.sidecar(), encoder.report())
    done = encoder.encode_from(unit.expert, spec.source)
    first = (
        spec.importance is None and unit.expert == 0
    )  # without importances no AWQ scale carries the report
    payload = np.concatenate([done.payloads[p] for p in PROJECTIONS])
    return Encoded(payload, encoder.report() if first else None, done.notes)


@one_blas_thread()
def run_units(
    spec: BuildSpec, todo: Sequence[WorkUnit], deliver: Callable[[WorkUnit, Encoded], None], workers: Workers
) -> None:
    """Encode units on the workers' threads and deliver each on the calling thread, in the given order.

    Few units are in flight at a time. Raises what a hook, the source or the encoder raises.
    """
    spec.source.schedule([t.name for unit in todo for t in unit.tensors if t.spec and unit.is_last])
    jobs, before_layer = workers.jobs, workers.before_layer
    with ThreadPoolExecutor(jobs, thread_name_prefix="encode") as pool:
        layers = Layers(spec, pool, workers.encoder)
        pending: deque[tuple[WorkUnit, Future[Encoded]]] = deque()

        def work(unit: WorkUnit, coming: Future[LayerEncoder] | None) -> Encoded:
            encoder = coming.result() if coming else None
            workers.on_begin(unit)
            return encode_unit(spec, unit, encoder)

        def finish() -> None:
            unit, future = pending.popleft()
            deliver(unit, future.result())
            if unit.layer is not None:
                layers.drop_before(unit.layer)
            for tensor in unit.tensors:
                if tensor.spec and unit.is_last:
                    spec.source.release(tensor.name)

        begun: int | None = None
        try:
            for unit, later in zip(todo, [*todo[PREPARE * jobs :], *todo[-PREPARE * jobs :]], strict=False):
                if before_layer is not None and unit.layer not in (None, begun):
                    while pending:
                        finish()
                    begun = unit.layer
                    layers.drop_before(begun)
                    before_layer(begun)
                # Deadlock guard: a layer's encoder is submitted before units that wait for it, or all threads could be
                # waiting.
                encoder = layers.of(unit)
                if before_layer is None or later.layer == begun:
                    layers.of(later)
                pending.append((unit, pool.submit(work, unit, encoder)))
                if len(pending) > AHEAD * jobs:
                    finish()
            while pending:
                finish()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
