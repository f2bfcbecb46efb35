"""A small checkpoint of several layers, the file that one machine makes of it, and a real Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_model
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile
from mq_quant.quantize.spec.places import choose_recipe
from small_imatrix import save_imatrix

LAYERS = 4
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS, "num_local_experts": 4}
CHANGES = RecipeChanges(alpha=0.3)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers with its imatrix."""
    folder = tmp_path_factory.mktemp("models") / "small"
    small_model.save(folder, small_model.tensors(config=CONFIG), config=CONFIG)
    save_imatrix(folder / "imatrix.gguf", layers=LAYERS, experts=4)
    return folder


def build(source: Path, output: Path, **options: Any) -> Path:
    """The mq2 file of the checkpoint, under its imatrix."""
    recipe = choose_recipe("mq2", None, str(source))
    statistics = ImatrixFile(source / "imatrix.gguf")
    return build_file(recipe, statistics, RunOptions(output, **options), CHANGES).path


@pytest.fixture(scope="session")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one machine makes."""
    return build(source, tmp_path_factory.mktemp("whole") / "out").read_bytes()


class Nodes:
    """A cluster of nodes with one core and one GPU each, though there is none, and a head that only looks after them;
    this process is its driver.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A node that was killed refuses connections, and is missed soon; one on a busy machine answers late.
        checks = {"initial_delay": 400, "period": 400, "timeout": 120_000}
        quick = {f"health_check_{name}_ms": value for name, value in checks.items()}
        head = {"num_cpus": 0, "include_dashboard": False, **_SMALL}
        self._cluster = Cluster(True, head_node_args={**head, "_system_config": quick})
        self.address: str = self._cluster.address
        self.nodes = [self._start(), self._start()]

    def _start(self) -> Any:
        return self._cluster.add_node(num_cpus=1, num_gpus=1, **_SMALL)

    def replace_one(self) -> None:
        """Kill a node, and start another one."""
        self._cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self._start())

    def shutdown(self) -> None:
        self._cluster.shutdown()


_SMALL = {"object_store_memory": 80 << 20}


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    """Two nodes of one core each, with this process as a driver."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = Nodes()
        try:
            ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
