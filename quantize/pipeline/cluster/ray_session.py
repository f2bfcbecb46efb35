"""The connection to a Ray cluster, and what its nodes have. Ray is an extra: nothing here is imported without it."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ....formats.errors import ClusterError
from ....formats.machine import cores, offer, variable

LOCAL = "local"
KNOCK = 10.0
"""Seconds in which something has to answer at the address of a cluster."""
STORE = 128 << 20
"""Bytes of the object store of a cluster that is started here: no payload passes through it."""

SEE_ALL_GPUS = {f"RAY_EXPERIMENTAL_NOSET_{make}_VISIBLE_DEVICES": "1" for make in ("CUDA", "HIP")}
"""The environment of tasks on GPUs. By default Ray shows a task its own GPU alone, and the next task of a process
may get another one, which a process that has used a GPU cannot see any more."""


@dataclass(frozen=True)
class Needs:
    """What a task asks of a node: cores, GPUs, bytes of memory."""

    cores: int
    gpus: int
    memory: int

    def slots(self, node: Mapping[str, float]) -> int:
        """How many of these tasks a node runs at a time."""
        asked = {"CPU": self.cores, "GPU": self.gpus, "memory": self.memory}
        return int(min(node.get(name, 0) // amount for name, amount in asked.items() if amount))

    def __str__(self) -> str:
        return in_words(self.cores, self.gpus, self.memory)

    def options(self) -> dict[str, Any]:
        """What Ray is asked for of each task.

        Without `max_calls` it ends a process after each task on a GPU, and what that has opened with it.
        """
        asked: dict[str, Any] = {"num_cpus": self.cores, "num_gpus": self.gpus, "memory": self.memory}
        if self.gpus:
            asked["runtime_env"] = {"env_vars": SEE_ALL_GPUS}
        return {**asked, "max_calls": 0}


def in_words(cores: float, gpus: float, memory: float) -> str:
    """Resources for a message."""
    counted = [f"{n:.0f} {what}{'s' * (n != 1)}" for n, what in ((cores, "core"), (gpus, "GPU"))]
    return f"{', '.join(counted)} and {memory / 1e9:.1f} GB of memory"


def load_ray() -> Any:
    """The module `ray`; ClusterError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ClusterError(
            "--ray needs Ray, which is not installed", hint="pip install 'mq-quant[ray]' on every node"
        ) from None


@contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
    """Be a driver of the cluster at this address, of the one of this machine (`auto`), or of one that is started here
    and ends with the block (`local`). A session that is open already is used, and stays.

    Raises ClusterError where there is no such cluster.
    """
    if ray.is_initialized():
        yield
        return
    if address.startswith("ray://"):
        raise ClusterError(
            "--ray takes no address of Ray's client: the driver writes the file, so it runs on a node of the cluster",
            hint="run the command on a node, with --ray auto",
        )
    offer("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options |= {"num_cpus": cores(), "object_store_memory": STORE}
    try:
        _knock(address)
        ray.init(**options)
    except (OSError, OverflowError, ValueError, RuntimeError) as e:
        said = str(e).strip().partition("\n")[0]
        raise ClusterError(
            f"no Ray cluster can be used at {address}: {said}",
            hint="start one with `ray start --head` and give its address, or give --ray local",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """OSError where nothing listens at an address with a port: Ray itself tries such an address for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


def own_gpu() -> int | None:
    """The GPU that Ray has given to the task which this process runs, by its number among those that the process sees;
    None where the task asked for none.
    """
    ids = load_ray().get_gpu_ids()
    if not ids:
        return None
    shown = variable("CUDA_VISIBLE_DEVICES") or variable("HIP_VISIBLE_DEVICES")
    return shown.split(",").index(str(ids[0])) if shown else int(ids[0])


def resources_of_nodes(ray: Any) -> list[dict[str, float]]:
    """What each living node has in all: CPU, GPU, memory."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
