"""The build: source tensor → f32 → encoded bytes at a known offset, journalled, resumable, the same for any --jobs.

Units of work run on a pool of threads and are written in the order of the work list; hashes follow in file order. One
encoder per layer fixes the layer's AWQ scale before its experts are encoded. Depends on all of quantize below the cli.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..formats.hfq import QuantizationHash, layout
from ..formats.minimax import PROJECTIONS, expert_name
from .encode import LayerEncoder, encode_plain
from .job import Job
from .journal import Journal
from .metadata import Outcome, complete
from .output import JOURNAL, PARTIAL, PartialOutput, beside, check_output
from .progress import Progress
from .units import Unit, units, work_order

READ_BYTES = 8 << 20
AHEAD = 2
"""Units in flight per worker: one that runs and one that waits."""

U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Options:
    """How a job is run; nothing here changes a byte of the file."""

    output: Path | None = None
    jobs: int = 1
    force: bool = False
    restart: bool = False
    quiet: bool = False

    def path(self, default_name: str) -> Path:
        return self.output or Path(default_name)

    def check(self, default_name: str, total_bytes: int) -> None:
        """Refuse an output that exists or does not fit; OutputError."""
        check_output(self.path(default_name), total_bytes, self.force)


@dataclass(frozen=True)
class Encoded:
    """A finished unit: its bytes, and for a layer's sidecar what the encoder reports of the layer."""

    payload: U8
    report: dict[str, Any] | None = None


@dataclass
class Layers:
    """The encoders of the layers in work, each prepared on the pool ahead of its units."""

    job: Job
    pool: ThreadPoolExecutor
    ready: dict[int, Future[LayerEncoder]] = field(default_factory=dict)

    def get(self, layer: int) -> Future[LayerEncoder]:
        if layer not in self.ready:
            self.ready[layer] = self.pool.submit(prepare_layer, self.job, layer)
        return self.ready[layer]

    def drop_before(self, layer: int) -> None:
        for old in [known for known in self.ready if known < layer]:
            del self.ready[old]


def prepare_layer(job: Job, layer: int) -> LayerEncoder:
    """The encoder of one layer, its AWQ scale fixed from the weights that it asks to see."""
    formats = {
        t.spec.projection: t.format
        for t in job.plan.tensors
        if t.layer == layer and t.spec and t.spec.projection and t.spec.expert == 0
    }
    importance = job.importance.layer(layer) if job.importance else None
    encoder = LayerEncoder(job.plan.config, layer, importance, formats, job.settings)
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
        return Encoded(encode_plain(weights, tensor.format).reshape(-1))
    if unit.expert is None:
        return Encoded(encoder.sidecar().reshape(-1), encoder.report())
    assert unit.layer is not None
    w1, w2, w3 = (job.source.weight(expert_name(unit.layer, unit.expert, p)) for p in PROJECTIONS)
    parts = encoder.encode_expert(unit.expert, w1, w3, w2)
    return Encoded(np.concatenate([parts[p].reshape(-1) for p in PROJECTIONS]))


def run_units(job: Job, jobs: int, todo: Sequence[Unit], deliver: Callable[[Unit, Encoded], None]) -> None:
    """Encode units on `jobs` threads and deliver each on the calling one, in the given order, with few in flight."""
    following = _following_layers(todo)
    with ThreadPoolExecutor(jobs, thread_name_prefix="encode") as pool:
        layers = Layers(job, pool)
        pending: deque[tuple[Unit, Future[Encoded]]] = deque()

        def work(unit: Unit, encoder: Future[LayerEncoder] | None) -> Encoded:
            return encode_unit(job, unit, encoder.result() if encoder else None)

        def finish() -> None:
            unit, future = pending.popleft()
            deliver(unit, future.result())

        try:
            for unit in todo:
                encoder = None
                if needs_encoder(unit) and unit.layer is not None:
                    # Queued before the units that wait for it, so the pool cannot fill up with waiting ones.
                    encoder = layers.get(unit.layer)
                    layers.drop_before(unit.layer)
                    if (coming := following.get(unit.layer)) is not None:
                        layers.get(coming)
                pending.append((unit, pool.submit(work, unit, encoder)))
                if len(pending) > AHEAD * jobs:
                    finish()
            while pending:
                finish()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _following_layers(todo: Sequence[Unit]) -> dict[int, int]:
    known = sorted({unit.layer for unit in todo if needs_encoder(unit) and unit.layer is not None})
    return dict(pairwise(known))


class Follower:
    """Hashes tensors in file order as soon as all bytes before them are written, reading them back from the file."""

    def __init__(self, job: Job, output: PartialOutput, order: Sequence[Unit]) -> None:
        self._job, self._output = job, output
        self._order = deque(order)
        self._done: set[str] = set()
        self._tensors = deque(job.plan.tensors)
        self._complete_to = 0
        self.hash = QuantizationHash()
        self.checksums: list[str] = []

    def advance(self, unit: Unit) -> None:
        """Note that a unit's bytes stand in the file, and hash what has become complete."""
        self._done.add(unit.key)
        while self._order and self._order[0].key in self._done:
            first = self._order.popleft()
            self._done.discard(first.key)
            self._complete_to = first.start + first.nbytes
        while self._tensors and self._tensors[0].start + self._tensors[0].nbytes <= self._complete_to:
            tensor = self._tensors.popleft()
            checksum = xxhash.xxh64()
            self.hash.update(tensor.meta(), self._read(tensor.start, tensor.nbytes, checksum))
            self.checksums.append(checksum.hexdigest())

    def _read(self, start: int, nbytes: int, checksum: xxhash.xxh64) -> Iterator[bytes]:
        for at in range(start, start + nbytes, READ_BYTES):
            size = min(READ_BYTES, start + nbytes - at)
            data = self._output.read(self._job.plan.data_offset + at, size)
            checksum.update(data)
            yield data


def build(job: Job, options: Options) -> dict[str, Any]:
    """Build a job's file, or continue its unfinished build; returns what `build --json` prints.

    The final name appears only when every byte is written and synced. Raises OutputError before any work where the
    output exists or does not fit, ResumeError where an unfinished build there is of another job.
    """
    began = time.monotonic()
    final = options.path(job.output_name)
    partial, log = beside(final, PARTIAL), beside(final, JOURNAL)
    options.check(job.output_name, job.plan.total_bytes)
    if options.restart or not (partial.exists() and log.exists()):
        for stale in (partial, log):
            stale.unlink(missing_ok=True)
    journal = Journal(log, job.signature)
    try:
        output = PartialOutput(final, job.plan.total_bytes)
        try:
            run = _write(job, options, journal, output)
            laid = layout(complete(job.metadata, run.outcome), [t.meta() for t in job.plan.tensors])
            output.write(0, memoryview(laid.header))
            output.commit()
        finally:
            output.close()
        log.unlink()
    finally:
        journal.close()
        if not journal.done:
            for nothing in (partial, log):
                nothing.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    return {
        "path": str(final),
        "total_bytes": job.plan.total_bytes,
        "tensor_count": len(job.plan.tensors),
        "quantization_hash": run.outcome.quantization_hash,
        "seconds": round(seconds, 3),
        "weights_per_second": round(run.weights / seconds),
        "peak_rss_bytes": peak_rss(),
        "coverage": job.importance.coverage if job.importance else None,
        "fallbacks": fallbacks(job, run.outcome),
        "fit": job.recipe.fit,
        "units": run.units,
        "resumed_units": run.resumed,
    }


@dataclass(frozen=True)
class _Run:
    """What one run of a build did: weights encoded by it, units in all, and units taken over from an earlier run."""

    outcome: Outcome
    weights: int
    units: int
    resumed: int


def _write(job: Job, options: Options, journal: Journal, output: PartialOutput) -> _Run:
    """Write every unit that is not yet there."""
    plan, in_file = job.plan, units(job.plan.tensors)
    shard_number = {shard: i for i, shard in enumerate(job.source.shards)}
    order = work_order(in_file, lambda name: shard_number[job.source.tensors[name].shard])
    kept = _intact(job, options, journal, output, order)
    todo = [unit for unit in order if unit.key not in kept]
    job.source.schedule([t.name for unit in todo for t in unit.tensors if t.spec])
    follower = Follower(job, output, in_file)
    for unit in order:
        if unit.key in kept:
            follower.advance(unit)
    total = sum(unit.weights for unit in in_file)
    weights = sum(unit.weights for unit in todo)
    with Progress(job.output_name, total, total - weights, options.quiet) as progress:

        def deliver(unit: Unit, done: Encoded) -> None:
            if done.payload.nbytes != unit.nbytes:
                raise AssertionError(
                    f"{unit.key}: {done.payload.nbytes} bytes encoded, {unit.nbytes} planned"
                )
            output.write(plan.data_offset + unit.start, done.payload.data)
            report = {"report": done.report} if done.report is not None else {}
            journal.record(unit.key, xxhash.xxh64_hexdigest(done.payload.data), **report)
            follower.advance(unit)
            if unit.is_last:
                for tensor in unit.tensors:
                    job.source.release(tensor.name)
            progress.advance(unit.weights, unit.key)

        run_units(job, options.jobs, todo, deliver)
    reports = [journal.done[unit.key]["report"] for unit in in_file if unit.is_sidecar]
    outcome = Outcome(follower.hash.hexdigest, follower.checksums, reports)
    return _Run(outcome, weights, len(in_file), len(kept))


def _intact(
    job: Job, options: Options, journal: Journal, output: PartialOutput, order: Sequence[Unit]
) -> frozenset[str]:
    """The units of an earlier run whose bytes still have the checksum that the journal holds for them."""

    def check(unit: Unit) -> bool:
        data = output.read(job.plan.data_offset + unit.start, unit.nbytes)
        return bool(xxhash.xxh64_hexdigest(data) == journal.done[unit.key]["xxh64"])

    known = [unit for unit in order if unit.key in journal.done]
    with ThreadPoolExecutor(options.jobs) as pool:
        return frozenset(unit.key for unit, good in zip(known, pool.map(check, known), strict=True) if good)


def fallbacks(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Every departure from the plain path, from the imatrix and from the encoders, with its count."""
    return {}


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
