"""The recipes of docs/machines.md, run with local processes in place of nodes: each makes the file of one machine."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_model
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.statistics import NoStatistics
from mq_quant.quantize.spec.places import choose_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "machines.md").read_text()
RECIPES = dict(re.findall(r"^```(?:bash|py)\n# ([\w.-]+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
PROGRAMS = {
    "mq-quant": f'exec {sys.executable} -c "from mq_quant.quantize.cli.app import main; main()" "$@"',
    "ssh": 'shift; exec sh -c "$*"',
    "scp": 'exec cp "${1#*:}" "$2"',
    # Jobs run at once, an array one after the other.
    "sbatch": """
for word; do case "$last" in --wrap) exec sh -c "$word";; esac; last=$word; done
count=$(sed -n 's/^#SBATCH --array=1-//p' "$last")
for n in $(seq "$count"); do SLURM_ARRAY_TASK_ID=$n SLURM_ARRAY_TASK_COUNT=$count sh -e "$last" >&2 || exit 1; done
echo 1
""",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.save(tmp_path_factory.mktemp("models") / "small", small_model.tensors())


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one machine makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recipe = choose_recipe("mq3", None, str(source))
    return build_file(recipe, NoStatistics(), RunOptions(out)).path.read_bytes()


@pytest.fixture
def here(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, for two nodes whose disks are folders, and with programs that run all of it here."""
    for name in ("bin", "far", "shared/parts"):
        (tmp_path / name).mkdir(parents=True)
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    for name, text in RECIPES.items():
        for old, new in (
            (r"/(data|shared)/MiniMax-M2\.7(?!\.)", str(source)),
            (r"/shared/", f"{tmp_path}/shared/"),
            (r"/tmp/m27", f"{tmp_path}/far/m27"),
            (r"node1 node2 node3 node4", "one two"),
            (r"--array=1-16", "--array=1-2"),
            (r'--effort imatrix|--effort", "imatrix', "--no-imatrix"),
        ):
            text = re.sub(old, new, text)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return tmp_path


def test_over_ssh(here: Path, whole: bytes) -> None:
    subprocess.run(["sh", "on-nodes.sh"], check=True)
    assert (here / "MiniMax-M2.7.mq3").read_bytes() == whole


def test_as_an_array_of_slurm_which_continues(here: Path, whole: bytes) -> None:
    submit = ["sh", "-e", "submit.sh"]
    with broken(here / "bin" / "mq-quant", "--part 2/2"):
        assert subprocess.run(submit, check=False).returncode != 0
    assert [path.name for path in (here / "shared" / "parts").iterdir()] == ["m27.part-1"]
    subprocess.run(submit, check=True)
    assert (here / "shared" / "MiniMax-M2.7.mq3").read_bytes() == whole


@contextmanager
def broken(program: Path, line: str) -> Iterator[None]:
    """A program that fails on lines that hold this."""
    text = program.read_text()
    program.write_text(text.replace("exec", f'case "$*" in *"{line}"*) exit 1;; esac\nexec', 1))
    yield
    program.write_text(text)


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed")
def test_on_dask(here: Path, whole: bytes) -> None:
    script = """
import sys
from dask.distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""
    (here / "cluster.py").write_text(script)
    run = [sys.executable, "cluster.py"]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        subprocess.run([sys.executable, "parts_on_dask.py", address, "2"], check=True)
        cluster.communicate()
    assert (here / "shared" / "MiniMax-M2.7.mq3").read_bytes() == whole
