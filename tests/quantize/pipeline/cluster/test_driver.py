"""Builds on a real Ray cluster of two nodes: the bytes of one machine, whatever is lost on the way."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import ClusterError, MqError, RecipeError
from mq_quant.quantize.calibrate.state import StateOptions, make_state
from mq_quant.quantize.calibrate.tokens import TokenRequest, load_tokens
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.cluster import driver, ray_session, tasks, waiting
from mq_quant.quantize.pipeline.cluster.driver import Cluster
from mq_quant.quantize.pipeline.cluster.job import Answer
from mq_quant.quantize.pipeline.cluster.ray_session import Needs
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.write.journal import read_journal
from mq_quant.quantize.write.partial_file import JOURNAL, beside

from .conftest import CHANGES, LAYERS, Nodes, build


def after(units: int, act: Callable[[], object]) -> Callable[[object], None]:
    """A hook that does something once so many units stand."""
    count = 0

    def hook(_: object) -> None:
        nonlocal count
        count += 1
        if count == units:
            act()

    return hook


def test_two_nodes_make_the_file_of_one_machine(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes
) -> None:
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address)).read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_a_shared_folder_payloads_are_sent(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes
) -> None:
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address, shared=False)).read_bytes() == whole


def test_tasks_that_ask_for_gpus_make_the_same_file(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "_needs", lambda *_: Needs(1, 1, 10**8))
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address)).read_bytes() == whole


def test_a_task_on_a_gpu_sees_all_of_them_and_has_one(nodes: Nodes) -> None:
    def look() -> tuple[str | None, int | None]:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), ray_session.own_gpu()

    ray = ray_session.load_ray()
    for gpus in (0, 1):
        asked = Needs(1, gpus, 10**8).options()
        assert ray.get(ray.remote(**asked)(look).remote()) == (None, 0 if gpus else None)


def test_a_node_is_lost_and_another_one_joins(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes
) -> None:
    hook = after(10, nodes.replace_one)
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address), on_done=hook).read_bytes() == whole


def killed_driver(source: Path, output: Path, address: str, units: int) -> None:
    """Build in a process of its own, which is killed once so many units stand."""
    script = f"""
import os, signal
from pathlib import Path
from conftest import build
from mq_quant.quantize.pipeline.cluster.driver import Cluster
count = []
def kill(unit):
    count.append(unit)
    if len(count) == {units}:
        os.kill(os.getpid(), signal.SIGKILL)
build(Path({str(source)!r}), Path({str(output)!r}), cluster=Cluster({address!r}), on_done=kill)
"""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[3]), *sys.path]
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)}, check=False)
    assert done.returncode == -signal.SIGKILL
    noted, _ = read_journal(beside(output, JOURNAL))
    assert len(noted) == 1 + units


def test_a_driver_that_is_killed_continues(source: Path, whole: bytes, tmp_path: Path, nodes: Nodes) -> None:
    killed_driver(source, tmp_path / "out", nodes.address, 20)
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address)).read_bytes() == whole
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif("MQ_QUANT_MODELS" not in os.environ, reason="MQ_QUANT_MODELS names no folder of models")
def test_a_trained_model_survives_the_loss_of_its_driver_and_of_a_node(tmp_path: Path, nodes: Nodes) -> None:
    trained, outputs = (
        Path(os.environ["MQ_QUANT_MODELS"]) / "trained-tiny",
        [tmp_path / "one", tmp_path / "many"],
    )
    build(trained, outputs[0])
    killed_driver(trained, outputs[1], nodes.address, 30)
    build(trained, outputs[1], cluster=Cluster(nodes.address), on_done=after(40, nodes.replace_one))
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs)
    assert first == second


def test_a_calibrated_build_begins_each_layer_from_a_state(
    source: Path, tmp_path: Path, nodes: Nodes
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(3).integers(0, 300, (4, 16)).astype(np.int32))
    asked, checkpoint = TokenRequest(tokens=tmp_path / "ids.npy"), open_checkpoint(source)
    streams = StateOptions(range(LAYERS))
    make_state(checkpoint, load_tokens(checkpoint, asked), tmp_path / "state", streams)
    recipe, alone = choose_recipe("mq2", None, str(source)), OnTheFly(asked)
    shared = replace(alone, state=tmp_path / "state")
    one = build_file(recipe, alone, RunOptions(tmp_path / "one"), CHANGES)
    options = RunOptions(tmp_path / "many", cluster=Cluster(nodes.address))
    many = build_file(recipe, shared, options, CHANGES)
    assert many.path.read_bytes() == one.path.read_bytes()
    assert many.coverage == one.coverage


def test_the_command(source: Path, whole: bytes, tmp_path: Path, nodes: Nodes) -> None:
    line = ["--tier", "mq2", "--source", str(source), "--imatrix", str(source / "imatrix.gguf")]
    more = ["--awq-alpha", "0.3", "--ray", nodes.address, "-q", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(["build", *line, *more])
    assert ended.value.code == 0
    assert (tmp_path / "out").read_bytes() == whole


def test_a_worker_that_stands_still_is_overtaken(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_of, stopped = tasks.Tasks._answer, set[int]()

    def stop_one(self: tasks.Tasks, *given: object) -> Answer:
        answer = answer_of(self, *given)  # type: ignore[arg-type]
        if not stopped:
            stopped.add(answer.pid)
            os.kill(answer.pid, signal.SIGSTOP)
        return answer

    monkeypatch.setattr(tasks.Tasks, "_answer", stop_one)
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address)).read_bytes() == whole
    assert stopped


def test_two_versions_in_one_cluster_are_refused(
    source: Path, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "identity", lambda: {"mq-quant": "0.0.1"})
    said = r"on node .*: runs another mq-quant than the driver: mq-quant is '0\.0\.1' there"
    with pytest.raises(ClusterError, match=said):
        build(source, tmp_path / "out", cluster=Cluster(nodes.address))
    assert not list(tmp_path.iterdir())


def test_a_source_that_a_worker_does_not_see_ends_the_build_which_continues(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes
) -> None:
    hidden = source.with_name("hidden")
    with pytest.raises(MqError, match=r"on node .*: .*small"):
        build(
            source,
            tmp_path / "out",
            cluster=Cluster(nodes.address),
            on_done=after(8, lambda: source.rename(hidden)),
        )
    hidden.rename(source)
    noted, _ = read_journal(tmp_path / "out.partial.journal")
    assert len(noted) > 8
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address)).read_bytes() == whole


def test_a_cluster_without_nodes_ends_the_build_which_continues(
    source: Path, whole: bytes, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(waiting, "LOST", 0.0)
        lost = after(8, lambda: patch.setattr(tasks, "resources_of_nodes", lambda _: []))
        with pytest.raises(
            ClusterError, match=r"no node of the cluster can take a task: .* there are no nodes"
        ):
            build(
                source,
                tmp_path / "out",
                cluster=Cluster(nodes.address, on_note=said.append),
                on_done=lost,
            )
    assert len(said) == 1
    noted, _ = read_journal(tmp_path / "out.partial.journal")
    assert len(noted) > 8
    assert build(source, tmp_path / "out", cluster=Cluster(nodes.address)).read_bytes() == whole


def test_tasks_that_fit_on_no_node_are_refused(source: Path, tmp_path: Path, nodes: Nodes) -> None:
    with pytest.raises(ClusterError, match="no node of the cluster has 64 cores"):
        build(source, tmp_path / "out", cluster=Cluster(nodes.address, threads=64))
    with pytest.raises(ClusterError, match="64 cores, 1 GPU and"):
        build(source, tmp_path / "out", cluster=Cluster(nodes.address, threads=64, device="cuda"))
    assert not list(tmp_path.iterdir())


# --- without a cluster ------------------------------------------------------------------------------------------------


def test_a_build_that_gathers_moments_says_what_to_do_instead(source: Path, tmp_path: Path) -> None:
    recipe, statistics = choose_recipe("mq2", None, str(source)), OnTheFly(TokenRequest())
    with pytest.raises(RecipeError, match="mq-quant calibrate"):
        build_file(recipe, statistics, RunOptions(tmp_path / "out", cluster=Cluster("local")), CHANGES)
    assert not list(tmp_path.iterdir())


def test_without_ray_it_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"not installed\n  pip install 'mq-quant\[ray\]'"):
        build(source, tmp_path / "out", cluster=Cluster("local"))
    assert not list(tmp_path.iterdir())


class NoRay:
    """Stands for Ray where no cluster answers."""

    @staticmethod
    def is_initialized() -> bool:
        return False

    @staticmethod
    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")


def test_an_address_without_a_cluster_is_named() -> None:
    nobody = pytest.raises(
        ClusterError, match=r"can be used at auto: Could not find any running Ray instance.\n"
    )
    with nobody, ray_session.connected(NoRay, "auto"):
        pass
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    refused = pytest.raises(ClusterError, match=rf"can be used at {address}: .*refused\n  start one")
    with refused, ray_session.connected(NoRay, address):
        pass
    client = pytest.raises(ClusterError, match="no address of Ray's client")
    with client, ray_session.connected(NoRay, "ray://head:10001"):
        pass


@pytest.mark.parametrize(
    ("shown", "given", "number"),
    [(None, [], None), (None, [1], 1), ("4,6", ["6"], 1), ("GPU-a,GPU-b", ["GPU-a"], 0)],
)
def test_the_gpu_of_a_task_is_numbered_as_its_process_sees_it(
    shown: str | None, given: list[object], number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session, "load_ray", lambda: SimpleNamespace(get_gpu_ids=lambda: given))
    monkeypatch.setattr(ray_session, "variable", {"CUDA_VISIBLE_DEVICES": shown}.get)
    assert ray_session.own_gpu() == number


def test_a_node_has_room_for_what_its_scarcest_resource_allows() -> None:
    node = {"CPU": 16.0, "GPU": 2.0, "memory": 10e9}
    assert Needs(4, 0, 10**9).slots(node) == 4
    assert Needs(4, 1, 10**9).slots(node) == 2
    assert Needs(4, 0, 4 * 10**9).slots(node) == 2
    assert Needs(1, 0, 1).slots({"CPU": 1.0}) == 0
