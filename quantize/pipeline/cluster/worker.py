"""A worker: it opens the build for itself, encodes slices, and answers with checksums.

A worker's process serves one driver, one slice at a time, and what it has opened stays open for the next slice.
"""

from __future__ import annotations

import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ....formats.checkpoint.local import Checkpoint
from ....formats.errors import CheckpointError, ClusterError, MqError
from ....formats.unchanged import UnchangedFile
from ...encode.encoders import Encoder, open_encoder
from ...spec.places import open_place
from ...spec.provenance import code, program
from ...write.journal import differences
from ..build_spec import BuildSpec, resolve
from ..encoding import Encoded
from ..statistics import OnTheFly
from ..turns import LayersInTurn, Turns
from ..work_units import WorkUnit, work_order
from ..worker_pool import Workers, run_units
from .delivery import open_sink
from .job import Answer, Failure, Job, Shard, Slice, Stands


def identity() -> dict[str, str]:
    """What of the program has to be equal on all nodes: its version, its sources and the libraries that compute."""
    return {"mq-quant": program()["version"], **code()}


def encode_slice(driver: Mapping[str, str], job: bytes, piece: Slice, gpu: int | None = None) -> Answer:
    """Encode the units of a slice of a pickled `Job`, of a driver with this identity; errors become the answer.

    A job for GPUs uses the one of this number. The job is looked at only where both are the same program. Everything
    that is answered stands in the output.
    """
    return _answer(driver, lambda: {"units": _HERE.open(job, gpu).encode(piece)})


def hash_shard(driver: Mapping[str, str], shard: Shard) -> Answer:
    """Hash a shard as this node sees it, for a driver with this identity; errors become the answer."""
    return _answer(driver, lambda: {"hashed": UnchangedFile(Path(shard.path), CheckpointError).known()})


def _answer(driver: Mapping[str, str], work: Callable[[], Mapping[str, Any]]) -> Answer:
    """What is answered of some work, which is done only where the driver is of the same program."""
    began, node = time.monotonic(), platform.node()
    try:
        _check(driver)
        done = work()
    except MqError as e:
        return Answer(node, os.getpid(), time.monotonic() - began, failure=Failure.of(e))
    return Answer(node, os.getpid(), time.monotonic() - began, **done)


def _check(driver: Mapping[str, str]) -> None:
    different = differences(driver, identity())
    if different:
        raise ClusterError(
            f"runs another mq-quant than the driver: {'; '.join(different)}",
            hint="install the same version of mq-quant, numpy, numba and scipy on all nodes",
        )


@dataclass(frozen=True)
class _Opened:
    """A job whose source, statistics and device are open."""

    job: Job
    spec: BuildSpec
    encoder: Encoder
    units: Mapping[str, WorkUnit]

    def encode(self, piece: Slice) -> tuple[Stands, ...]:
        """The units of a slice, encoded, written and synced."""
        offsets, done = dict(piece.units), list[Stands]()
        with open_sink(self.job.target) as sink:

            def deliver(unit: WorkUnit, encoded: Encoded) -> None:
                payload = encoded.payload.data.cast("B")
                sink.put(offsets[unit.key], payload)
                done.append(Stands(unit.key, xxhash.xxh64_hexdigest(payload), encoded.record))

            todo = [self.units[key] for key in offsets]
            with self._gathering(todo[0].layer) as turns:
                workers = Workers(self.job.threads, self.encoder, turns=turns)
                run_units(self.spec, todo, deliver, workers)
            sink.sync()
        return tuple(done)

    @contextmanager
    def _gathering(self, layer: int | None) -> Iterator[Turns | None]:
        """What has the moments of a layer ready, from the stream that enters it, where the build gathers moments."""
        gathered = self.spec.gathered
        if gathered is None or layer is None:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            gathered.open(Path(folder) / "moments", layer, layer)
            try:
                yield LayersInTurn(gathered)
            finally:
                gathered.close()


class _Workplace:
    """What this process has open: one job on one device."""

    def __init__(self) -> None:
        self._at: tuple[bytes, int | None] | None = None
        self._stack = ExitStack()

    def open(self, job: bytes, gpu: int | None) -> _Opened:
        """What a job has open on a GPU, or on the CPU; it stays so for the next slice."""
        if self._at != (job, gpu):
            self.close()
            with ExitStack() as stack:
                self._opened = _open(job, gpu, stack)
                self._stack, self._at = stack.pop_all(), (job, gpu)
        return self._opened

    def close(self) -> None:
        """Let go of it."""
        self._at = None
        self._stack.close()


_HERE = _Workplace()


def _open(job: bytes, gpu: int | None, stack: ExitStack) -> _Opened:
    """Open a job, until the stack is closed; the errors of `open_builds` and `open_encoder`, and ClusterError where
    this node sees other inputs than the driver.
    """
    given: Job = pickle.loads(job)
    place, statistics = given.recipe.model.place, given.statistics
    source = open_place(place.address, place.revision, given.shard_cache, Path(tempfile.gettempdir()))
    stack.callback(source.close)
    source.validate()
    if isinstance(source, Checkpoint):
        source.believe(given.hashes)
    number = "" if given.device == "cpu" or gpu is None else f":{gpu}"
    if isinstance(statistics, OnTheFly) and statistics.device != "cpu":
        from torch.cuda import empty_cache

        stack.callback(empty_cache)
        statistics = replace(statistics, device=statistics.device + number)
    spec = resolve(given.recipe, statistics, source)
    different = differences(given.signature, spec.signature)
    if different:
        raise ClusterError(
            "has other inputs than the driver:" + "".join(f"\n    {line}" for line in different),
            hint="give every node the same checkpoint and imatrix or calibration",
        )
    encoder = stack.enter_context(open_encoder(given.device + number))
    return _Opened(given, spec, encoder, {unit.key: unit for unit in work_order(spec)})
