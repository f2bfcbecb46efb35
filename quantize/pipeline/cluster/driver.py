"""The driver of a build on a Ray cluster: it cuts the work, hands slices to Ray, and notes what stands.

Ray schedules: it places a slice where the cores, GPUs and memory are that it asks for, runs it again where a node or a
process is lost, and shows all of them on its dashboard. The driver's journal is the only one, so a driver that is lost
continues like any build. A unit counts when its bytes, read back, have the worker's checksum.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....formats.checkpoint.local import Checkpoint
from ....formats.checkpoint.source import Source
from ....formats.errors import ClusterError, RecipeError
from ....formats.watch import Watch
from ...spec.calibration_sizes import inline_sizes, moment_bytes
from ...spec.estimates import worker_memory
from ...spec.hooks import nothing
from ...write.partial_file import PartialFile
from ..build_spec import BuildSpec
from ..statistics import MomentFolder, OnTheFly, Statistics
from ..work_units import WorkUnit
from .delivery import receiving
from .job import Answer, Job, Shard, Slice
from .ray_session import LOCAL, Needs, connected, load_ray, own_gpu, resources_of_nodes
from .slices import cut
from .tasks import Tasks
from .worker import encode_slice, hash_shard, identity

WORTH_SHARING = 10 << 30
"""Bytes of a checkpoint from which on its hashing is shared: workers need seconds to start."""
HASHING = Needs(1, 0, 100 << 20)
"""What hashing one shard takes."""


@dataclass
class Output:
    """The unfinished file, the units that it still needs, and who hears of each that stands."""

    file: PartialFile
    missing: dict[str, WorkUnit]
    stands: Callable[[WorkUnit], None]

    def note(self, piece: Slice, answer: Answer) -> bool:
        """Note the units of an answer that are missing yet; false where the bytes of one are not as they were told."""
        for told in answer.units:
            unit = self.missing.get(told.key)
            if unit is None:
                continue
            if not self.file.note(unit, told.digest, told.record):
                return False
            del self.missing[told.key]
            self.stands(unit)
        return True


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that encodes a build: an address as `ray.init` takes it, `auto`, or `local`.

    A task has `threads` of them, by default half the cores of the smallest node, so that of two tasks one encodes while
    the other waits for shards; on a `device` that is a GPU it has one GPU. Where the output's folder is not `shared`
    workers send payloads to the driver; by default each finds that out.
    """

    address: str
    threads: int | None = None
    device: str = "cpu"
    shard_cache: int = 2
    shared: bool = True
    on_note: Callable[[str], None] = nothing

    def check(self, statistics: Statistics | None) -> None:
        """RecipeError where a build needs layers one after the other, so that no cluster makes it faster."""
        if not isinstance(statistics, OnTheFly):
            return
        if statistics.tuning is not None:
            raise RecipeError(
                "a tuned layer follows from all layers before it, so a cluster does not tune",
                hint="build with --effort calibrated, and tune the file with `mq-quant tune`",
            )
        if statistics.state is None:
            raise RecipeError(
                "a cluster does not run the model layer by layer, as --effort calibrated asks for",
                hint="run it once with `mq-quant calibrate --streams`, and give its folder as --calibration-state",
            )

    def hash_source(self, source: Source, watch: Watch) -> None:
        """Have the nodes hash the shards of a large folder that they see as this machine does: together they read
        faster than the driver, which hashes the others. Errors as `run`.
        """
        if self.address == LOCAL or not isinstance(source, Checkpoint):
            return
        sizes = source.shard_bytes()
        total = sum(sizes.values())
        if total < WORTH_SHARING:
            return
        watch.begin("hashing the source", total, "bytes")

        def note(shard: Shard, answer: Answer) -> bool:
            if answer.hashed is not None:
                source.trust(shard.name, answer.hashed)
            watch.advance(sizes[shard.name], shard.name)
            return True

        ray = load_ray()
        with connected(ray, self.address):
            _workers(ray, HASHING)
            shards = [Shard(name, str(source.path.absolute() / name)) for name in sizes]
            Tasks(ray, HASHING, hash_shard, (identity(),), note, self.on_note).run(shards)

    def run(
        self,
        spec: BuildSpec,
        order: Sequence[WorkUnit],
        todo: Sequence[WorkUnit],
        file: PartialFile,
        stands: Callable[[WorkUnit], None],
    ) -> None:
        """Encode the units `todo` of an `order` into the file; `stands(unit)` is called once each is noted.

        Raises ClusterError where the cluster cannot be used or a worker failed; what stands by then is noted.
        """
        ray = load_ray()
        with connected(ray, self.address):
            needs = self._needs(ray, spec)
            workers = _workers(ray, needs)
            host = ray.util.get_node_ip_address()
            with receiving(file.path, host, file.write, self.shared) as target:
                job = Job.of(spec, target, needs.cores, self.device, self.shard_cache)
                whole = spec.gathered is not None or spec.source.disk_bytes() > 0
                slices = cut(order, todo, file.data_offset, workers, whole)
                output = Output(file, {unit.key: unit for unit in todo}, stands)
                told = identity(), pickle.dumps(job)
                Tasks(ray, needs, _encode, told, output.note, self.on_note).run(slices)

    def _needs(self, ray: Any, spec: BuildSpec) -> Needs:
        gpus = 0 if self.device == "cpu" else 1
        nodes = [node for node in resources_of_nodes(ray) if node.get("CPU") and node.get("GPU", 0) >= gpus]
        smallest = min((int(node["CPU"] / max(1, node.get("GPU", 0) * gpus)) for node in nodes), default=1)
        threads = self.threads or max(1, smallest if gpus else -(-smallest // 2))
        largest = max(unit.weights for unit in spec.plan.tensors)
        memory = worker_memory(spec.plan.config, largest, threads)
        if isinstance(spec.statistics, MomentFolder | OnTheFly):
            memory += moment_bytes(spec.plan.config, threads)
        if spec.gathered is not None:
            memory = inline_sizes(spec.plan.config, spec.gathered.tokens.size, memory).memory_bytes
        return Needs(threads, gpus, memory)


def _workers(ray: Any, needs: Needs) -> int:
    """How many tasks with these needs the cluster runs at a time; ClusterError where it runs none."""
    workers = sum(map(needs.slots, resources_of_nodes(ray)))
    if not workers:
        raise ClusterError(
            f"no node of the cluster has {needs} for one task",
            hint="give fewer --jobs, or start larger nodes",
        )
    return workers


def _encode(driver: Mapping[str, str], job: bytes, piece: Slice) -> Answer:
    """What a task runs, on a node."""
    return encode_slice(driver, job, piece, own_gpu())
