"""Where workers get their inputs from besides a folder with an imatrix: a calibration, and the hub itself."""

from __future__ import annotations

import os
import subprocess
import sys
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hub_server
import numpy as np
import pytest
from mq_quant.formats import unchanged
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.quantize.calibrate.run import CalibrationOptions, calibrate
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.cluster import driver
from mq_quant.quantize.pipeline.cluster.driver import Cluster
from mq_quant.quantize.pipeline.statistics import MomentFolder, NoStatistics
from mq_quant.quantize.spec.places import choose_recipe
from watching import Heard

from .conftest import CHANGES, Nodes, build


def test_every_node_reads_the_moments_of_a_calibration(source: Path, tmp_path: Path, nodes: Nodes) -> None:
    tokens = np.random.default_rng(5).integers(0, 300, (4, 16)).astype(np.int32)
    calibrate(open_checkpoint(source), tokens, tmp_path / "moments", CalibrationOptions())
    recipe, statistics = choose_recipe("mq2", None, str(source)), MomentFolder(tmp_path / "moments")
    one = build_file(recipe, statistics, RunOptions(tmp_path / "one"), CHANGES)
    cluster = RunOptions(tmp_path / "many", cluster=Cluster(nodes.address))
    many = build_file(recipe, statistics, cluster, CHANGES)
    assert many.path.read_bytes() == one.path.read_bytes()
    assert many.coverage == one.coverage


def test_nodes_hash_the_shards_of_a_folder_that_they_share(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, sha256 = list[str](), unchanged._sha256

    def here(file: BufferedReader, *given: Any, **named: Any) -> str:
        hashed.append(file.name)
        return sha256(file, *given, **named)

    monkeypatch.setattr(unchanged, "_sha256", here)
    monkeypatch.setattr(driver, "WORTH_SHARING", 1)
    watch = Heard()
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address), watch=watch).read_bytes() == whole
    assert not [name for name in hashed if name.endswith(".safetensors")]
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert watch.phase("hashing the source") == (size, 0, size)


def test_every_worker_fetches_its_own_shards_and_leaves_none(
    small_hub: hub_server.HubServer, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    one = build_file(
        choose_recipe("mq2", None, hub_server.REPO), NoStatistics(), RunOptions(tmp_path / "one")
    )
    script = "import sys; from mq_quant.quantize.cli.app import main; main(sys.argv[1:])"
    line = [
        "build",
        "--tier",
        "mq2",
        "--source",
        hub_server.REPO,
        "--no-imatrix",
        "--ray",
        "local",
        "--jobs",
        "1",
    ]
    output = ["-q", "-o", str(tmp_path / "many")]
    # Names of sockets are short, so what pytest offers lies too deep.
    with TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as scratch:
        own = {"HF_HOME": str(tmp_path / "home"), "TMPDIR": scratch, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = [sys.executable, "-c", script, *line, *output]
        subprocess.run(run, env={**os.environ, **own}, check=True)
        assert not list(Path(scratch).rglob("*.safetensors"))
    assert (tmp_path / "many").read_bytes() == one.path.read_bytes()
