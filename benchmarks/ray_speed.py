"""How much faster two Ray workers of one core each are than one: the same build, on one node and on two.

Run `python benchmarks/ray_speed.py` on a machine with two idle cores: it makes a random checkpoint of 300 million
weights (`--layers 24`), starts a real cluster, and builds with one node and with two, each time once before so that
every worker has started. Bar: two are at least 1.7 times as fast as one, by the median of `--repeat` builds, with the
hashing of the source. Where other programs take a core, two workers have no more than one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import small_model  # noqa: E402
from mq_quant.quantize.pipeline.build import RunOptions, build_file  # noqa: E402
from mq_quant.quantize.pipeline.build_spec import UNCHANGED  # noqa: E402
from mq_quant.quantize.pipeline.cluster.driver import Cluster  # noqa: E402
from mq_quant.quantize.pipeline.statistics import ImatrixFile  # noqa: E402
from mq_quant.quantize.spec.places import choose_recipe  # noqa: E402
from small_imatrix import save_imatrix  # noqa: E402

EXPERTS = 64
BAR = 1.7


def checkpoint(folder: Path, layers: int) -> Path:
    """A random checkpoint with an imatrix."""
    config = {**small_model.CONFIG, "num_hidden_layers": layers, "num_local_experts": EXPERTS}
    source = small_model.save(folder / "source", small_model.tensors(config=config), config=config)
    save_imatrix(source / "imatrix.gguf", layers=layers, experts=EXPERTS)
    return source


def seconds(source: Path, output: Path, address: str | None) -> float:
    """Seconds of a whole build, on the cluster at an address, or in this process with one worker."""
    cluster = Cluster(address) if address else None
    recipe = choose_recipe("mq3", None, str(source))
    began = time.monotonic()
    options = RunOptions(output, force=True, cluster=cluster)
    build_file(recipe, ImatrixFile(source / "imatrix.gguf"), options, UNCHANGED)
    return time.monotonic() - began


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, output = checkpoint(Path(folder), given.layers), Path(folder) / "out"
        nodes = Nodes(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        taken: dict[int, list[float]] = {0: [], 1: [], 2: []}
        taken[0] = [seconds(source, output, None) for _ in range(given.repeat)]
        for count in (1, 2):
            if count == 2:
                nodes.add_node(num_cpus=1)
            seconds(source, output, nodes.address)  # each worker starts and opens the build
            taken[count] = [seconds(source, output, nodes.address) for _ in range(given.repeat)]
        ray.shutdown()
        nodes.shutdown()
    alone, one, two = (median(taken[count]) for count in (0, 1, 2))
    print(f"load of the machine   {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"without Ray, 1 worker {alone:.1f} s")
    print(f"Ray, 1 worker         {one:.1f} s")
    print(f"Ray, 2 workers        {two:.1f} s, {one / two:.2f} times as fast (bar: {BAR})")
    sys.exit(one / two < BAR)


if __name__ == "__main__":
    main()
