"""Workers: units of work run on a pool of threads and are handed over in the order of the work list.

Several files of one source are encoded in step. Neither the number of threads, nor the order of the work, nor the other
files change a byte.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import MqError
from ..encode.blas import one_blas_thread
from ..encode.encoders import CPU, Encoder
from ..encode.layer_encoder import LayerEncoder
from ..spec.hooks import nothing
from .build_spec import BuildSpec
from .encoding import Encoded, Step, encode_block, in_blocks, prepare_layers
from .short_collections import short_collections
from .turns import Turns
from .work_units import WorkUnit

AHEAD = 2
"""Blocks of units in flight per worker: one that is encoded and one that waits."""
PREPARE = 4
"""A layer's encoder is prepared this many units per worker before the layer's first unit."""

U8 = NDArray[np.uint8]
UnitHook = Callable[[WorkUnit], None]


@dataclass(frozen=True)
class Workers:
    """How units are run, in `turns` by layer where they are given; `on_begin(unit)` runs on the worker's thread before
    the unit is encoded.
    """

    jobs: int = 1
    encoder: Encoder = CPU
    on_begin: UnitHook = nothing
    turns: Turns | None = None


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
@short_collections()
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
    jobs, turns, blocks = workers.jobs, workers.turns, in_blocks(specs, todo)
    files: dict[int, set[int]] = defaultdict(set)
    for step in todo:
        if step.unit.layer is not None:
            files[step.unit.layer].update(step.units)
    with ThreadPoolExecutor(jobs, thread_name_prefix="encode") as pool:
        layers = Layers(specs, files, gone, pool, workers.encoder)
        pending: deque[tuple[tuple[Step, ...], Future[list[dict[int, Encoded | MqError]]]]] = deque()

        def work(
            block: Sequence[Step], coming: Future[dict[int, LayerEncoder]] | None
        ) -> list[dict[int, Encoded | MqError]]:
            encoders = coming.result() if coming else None
            dropped = [n for n in block[0].units if n in gone]  # asked once: it may change meanwhile
            left = [step.without(dropped) for step in block]
            for step in left:
                for unit in step.units.values():
                    workers.on_begin(unit)
            return encode_block(specs, left, encoders) if left[0].units else [{} for _ in block]

        def finish() -> None:
            block, future = pending.popleft()
            for step, results in zip(block, future.result(), strict=True):
                for n, done in results.items():
                    if n not in gone:
                        deliver(n, step.units[n], done)
            unit = block[-1].unit
            if unit.layer is not None:
                layers.drop_before(unit.layer)
                if turns is not None:
                    turns.end_before(unit.layer)
            for tensor in (tensor for step in block if step.unit.is_last for tensor in step.unit.tensors):
                if tensor.spec:
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
            for block, start in zip(blocks, accumulate(map(len, blocks), initial=0), strict=False):
                unit, soon = block[0].unit, todo[min(start + PREPARE * jobs, len(todo) - 1)].unit
                if not block[0].without(gone).units:
                    continue
                if turns is not None and unit.layer is not None and unit.layer != begun:
                    begin(unit.layer)
                    begun = unit.layer
                # Deadlock guard: a layer's encoder is submitted before units that wait for it, or all threads could be
                # waiting.
                encoders = layers.of(unit)
                ahead = soon.layer
                if turns is None or ahead == begun or (ahead is not None and turns.under_way(ahead)):
                    layers.of(soon)
                pending.append((block, pool.submit(work, block, encoders)))
                if len(pending) > AHEAD * jobs:
                    finish()
            while pending:
                finish()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
