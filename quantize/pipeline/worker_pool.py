"""The engine: units of work run on a pool of threads and handed over in the order of the work list.

One encoder per layer fixes the layer's AWQ scale before its experts are encoded. What comes out is a pure function of
the job: neither the number of threads nor the order of the work changes a byte. Depends on encode, blas, job and
units.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.minimax import PROJECTIONS, expert_name
from ..encode.blas import one_blas_thread
from ..encode.encoders import CPU, Encoder
from ..encode.layer_encoder import LayerEncoder
from ..encode.overflow import encode_tensor
from .build_spec import Job
from .work_units import Unit, units, work_order

AHEAD = 2
"""Units in flight per worker: one that runs and one that waits."""
PREPARE = 4
"""A layer's encoder is prepared this many units per worker before its first unit."""

U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """A finished unit: its bytes, for a layer's sidecar what the encoder reports of the layer, for an expert what its
    rounding fell back on.
    """

    payload: U8
    report: dict[str, Any] | None = None
    notes: Mapping[str, Sequence[str]] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What the journal keeps of it besides the checksum."""
        kept = {"report": self.report, "notes": self.notes}
        return {key: value for key, value in kept.items() if value}


@dataclass
class Layers:
    """The encoders of the layers in work, each prepared on the pool ahead of its units."""

    job: Job
    pool: ThreadPoolExecutor
    coder: Encoder
    ready: dict[int, Future[LayerEncoder]] = field(default_factory=dict)

    def of(self, unit: Unit) -> Future[LayerEncoder] | None:
        """The encoder that a unit needs, its preparation begun if it was not; None for tensors outside experts."""
        layer = unit.layer
        if layer is None or not needs_encoder(unit):
            return None
        if layer not in self.ready:
            self.ready[layer] = self.pool.submit(prepare_layer, self.job, layer, self.coder)
        return self.ready[layer]

    def drop_before(self, layer: int) -> None:
        for old in [known for known in self.ready if known < layer]:
            del self.ready[old]


def prepare_layer(job: Job, layer: int, coder: Encoder = CPU) -> LayerEncoder:
    """The encoder of one layer, its AWQ scale fixed from the weights that it asks to see."""
    formats = {
        t.spec.projection: t.format
        for t in job.plan.tensors
        if t.layer == layer and t.spec and t.spec.projection and t.spec.expert == 0
    }
    importance = job.importance.layer(layer) if job.importance else None
    encoder = LayerEncoder(job.plan.config, layer, importance, formats, job.settings, coder)
    encoder.prepare({name: job.source.weight(name) for name in encoder.needs_samples()})
    return encoder


def needs_encoder(unit: Unit) -> bool:
    return unit.expert is not None or unit.is_sidecar


def encode_unit(job: Job, unit: Unit, encoder: LayerEncoder | None) -> Encoded:
    """The bytes of one unit, a pure function of the job."""
    if encoder is None:
        (tensor,) = unit.tensors
        name, rows = tensor.name, unit.rows
        weights = job.source.rows(name, *rows) if rows else job.source.weight(name)
        return Encoded(encode_tensor(name, weights, tensor.format, job.settings.fit))
    if unit.expert is None:
        return Encoded(encoder.sidecar(), encoder.report())
    assert unit.layer is not None
    w1, w2, w3 = (job.source.weight(expert_name(unit.layer, unit.expert, p)) for p in PROJECTIONS)
    # Released as soon as they are read: a shard that is held until delivery delays the next one's download.
    for tensor in unit.tensors:
        job.source.release(tensor.name)
    done = encoder.encode_expert(unit.expert, w1, w3, w2)
    return Encoded(np.concatenate([done.payloads[p] for p in PROJECTIONS]), notes=done.notes)


@one_blas_thread()
def run_units(
    job: Job,
    jobs: int,
    todo: Sequence[Unit],
    deliver: Callable[[Unit, Encoded], None],
    coder: Encoder = CPU,
    before_layer: Callable[[int], None] | None = None,
) -> None:
    """Encode units on `jobs` threads and deliver each on the calling one, in the given order, with few in flight.

    `before_layer`, where given, is called on the calling thread before anything of a layer begins, when all that comes
    before it is delivered.
    """
    job.source.schedule([t.name for unit in todo for t in unit.tensors if t.spec and unit.is_last])
    with ThreadPoolExecutor(jobs, thread_name_prefix="encode") as pool:
        layers = Layers(job, pool, coder)
        pending: deque[tuple[Unit, Future[Encoded]]] = deque()

        def work(unit: Unit, encoder: Future[LayerEncoder] | None) -> Encoded:
            return encode_unit(job, unit, encoder.result() if encoder else None)

        def finish() -> None:
            unit, future = pending.popleft()
            deliver(unit, future.result())
            if unit.layer is not None:
                layers.drop_before(unit.layer)
            for tensor in unit.tensors:
                if tensor.spec and unit.is_last:
                    job.source.release(tensor.name)

        begun: int | None = None
        try:
            for unit, coming in zip(todo, [*todo[PREPARE * jobs :], *todo[-PREPARE * jobs :]], strict=False):
                if before_layer is not None and unit.layer not in (None, begun):
                    while pending:
                        finish()
                    begun = unit.layer
                    layers.drop_before(begun)
                    before_layer(begun)
                # Encoders are queued before the units that wait for them, so the pool cannot fill up with waiting ones.
                encoder = layers.of(unit)
                if before_layer is None or coming.layer == begun:
                    layers.of(coming)
                pending.append((unit, pool.submit(work, unit, encoder)))
                if len(pending) > AHEAD * jobs:
                    finish()
            while pending:
                finish()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def schedule(job: Job) -> list[Unit]:
    """All units in the order in which they are best encoded."""
    number = {shard: i for i, shard in enumerate(job.source.shards)}
    return work_order(units(job.plan.tensors), lambda name: number[job.source.tensors[name].shard])
