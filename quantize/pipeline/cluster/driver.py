"""The driver of a build on a Ray cluster: it cuts the work, hands slices to Ray, and notes what stands.

Ray schedules: it places a slice where the cores, GPUs and memory are that it asks for, runs it again where a node or a
process is lost, and shows all of them on its dashboard. The driver's journal is the only one, so a driver that is lost
continues like any build. A unit counts when its bytes, read back, have the worker's checksum.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ....formats.errors import ClusterError, RecipeError
from ...spec.calibration_sizes import inline_sizes, moment_bytes
from ...spec.estimates import worker_memory
from ...spec.hooks import nothing
from ...write.partial_file import PartialFile
from ..build_spec import BuildSpec
from ..statistics import MomentFolder, OnTheFly, Statistics
from ..work_units import WorkUnit
from .delivery import receiving
from .job import Job
from .ray_session import Needs, connected, load_ray, resources_of_nodes
from .slices import cut
from .tasks import Output, Tasks


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
            workers = sum(map(needs.slots, resources_of_nodes(ray)))
            if not workers:
                raise ClusterError(
                    f"no node of the cluster has {needs} for one task",
                    hint="give fewer --jobs, or start larger nodes",
                )
            host = ray.util.get_node_ip_address()
            with receiving(file.path, host, file.write, self.shared) as target:
                job = Job.of(spec, target, needs.cores, self.device, self.shard_cache)
                whole = spec.gathered is not None or spec.source.disk_bytes() > 0
                slices = cut(order, todo, file.data_offset, workers, whole)
                output = Output(file, {unit.key: unit for unit in todo}, stands)
                Tasks(ray, needs, pickle.dumps(job), output, self.on_note).run(slices)

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
