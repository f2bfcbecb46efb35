"""The machine: cores by control groups of both versions, and variables of the environment from one table."""

from __future__ import annotations

import ast
import math
import os
import re
from pathlib import Path

import pytest
from mq_quant.formats import machine
from mq_quant.formats.errors import BackendError
from mq_quant.formats.machine import (
    VARIABLES,
    cores,
    home,
    leave_out_foreign_settings,
    quota,
    variable,
    words,
)

ROOT = Path(machine.__file__).parents[1]


def tree(root: Path, cgroup: str, mountinfo: str, limits: dict[str, str]) -> Path:
    """A root folder with the files of proc, and the files of control groups by path."""
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **limits}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "30 25 0:26 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 25 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert quota(tmp_path) == math.inf
    assert quota(tree(tmp_path, "nonsense\n\n0::\n", "nonsense\n - \n - cgroup2\n", {})) == math.inf


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("max 100000\n", math.inf), ("150000 100000\n", 1.5), ("20000 100000\n", 0.2), ("", math.inf),
     ("300000\n", math.inf), ("x y\n", math.inf), ("0 100000\n", math.inf)],
)  # fmt: skip
def test_a_group_of_version_two_says_how_much(tmp_path: Path, text: str, allowed: float) -> None:
    limits = {"sys/fs/cgroup/a.slice/b.scope/cpu.max": text}
    assert quota(tree(tmp_path, "0::/a.slice/b.scope\n", V2.format(root="/"), limits)) == allowed


def test_the_least_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    limits = {
        "sys/fs/cgroup/a/cpu.max": "50000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
        "sys/fs/cgroup/b/cpu.max": "10000 100000",  # of another group
    }
    assert quota(tree(tmp_path, "0::/a/b\n", V2.format(root="/"), limits)) == 0.5


@pytest.mark.parametrize("group", ["/", "/docker/0123", "/../other"])
def test_in_a_container_the_mounted_group_counts(tmp_path: Path, group: str) -> None:
    limits = {"sys/fs/cgroup/cpu.max": "200000 100000"}
    assert quota(tree(tmp_path, f"0::{group}\n", V2.format(root="/docker/0123"), limits)) == 2


@pytest.mark.parametrize(("root", "folder"), [("/", "cpu,cpuacct/docker/01"), ("/docker/01", "cpu,cpuacct")])
def test_version_one_is_read_too(tmp_path: Path, root: str, folder: str) -> None:
    limits = {
        f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us": "75000\n",
        f"sys/fs/cgroup/{folder}/cpu.cfs_period_us": "50000\n",
    }
    cgroup = "4:memory:/docker/01\n3:cpu,cpuacct:/docker/01\n0::/\n"
    assert quota(tree(tmp_path, cgroup, V1.format(root=root), limits)) == 1.5
    (tmp_path / f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us").write_text("-1\n")
    assert quota(tmp_path) == math.inf


@pytest.mark.parametrize(("allowed", "count"), [(math.inf, 5), (0.2, 1), (1.0, 1), (2.5, 3), (9.0, 5)])
def test_cores_are_those_that_the_mask_and_the_groups_allow(
    monkeypatch: pytest.MonkeyPatch, allowed: float, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    monkeypatch.setattr(machine, "quota", lambda: allowed)
    assert cores() == count


def test_blank_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "  ")
    assert variable("CXX") is None and words("CXX") == ()
    monkeypatch.delenv("CXX")
    assert variable("CXX") is None
    with pytest.raises(KeyError):
        variable("NOT_IN_THE_TABLE")


def test_values_are_split_as_a_shell_splits_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for value, split in {
        "g++": ("g++",),
        "ccache g++ -O1": ("ccache", "g++", "-O1"),
        "'/my tools/cc' -O1": ("/my tools/cc", "-O1"),
        r"/my\ tools/cc": ("/my tools/cc",),
    }.items():
        monkeypatch.setenv("CXX", value)
        assert words("CXX") == split
    (tmp_path / "my cc").write_text("")
    monkeypatch.setenv("CXX", str(tmp_path / "my cc"))
    assert words("CXX") == (str(tmp_path / "my cc"),)
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(BackendError, match="CXX cannot be split into words: No closing quotation"):
        words("CXX")


def test_a_user_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert home() is None
    monkeypatch.undo()
    monkeypatch.setenv("HOME", "somewhere")
    assert home() is None


def test_the_page_of_the_machine_has_the_table() -> None:
    page = (ROOT / "docs" / "first-file.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    assert dict(rows) == VARIABLES


def test_no_other_module_reads_the_environment() -> None:
    """os.environ is named in machine.py, and where a compiler's environment is passed on."""
    rooms = ("formats", "awq", "lloyd", "kernels", "verify", "quantize")
    found = set()
    for path in [p for room in rooms for p in (ROOT / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
                found.add(str(path.relative_to(ROOT)))
    assert found == {"formats/machine.py", "kernels/runtime/command.py"}
    assert all(meaning and not meaning.endswith(".") for meaning in VARIABLES.values())


def test_what_the_shell_sets_for_other_programs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {
        "NUMBA_DISABLE_JIT": "1",
        "NUMBA_NUM_THREADS": "none",
        "TORCH_LOGS": "x",
        "SOURCE_DATE_EPOCH": "today",
    }
    for name, value in {**foreign, "NUMBA_CACHE_DIR": "here"}.items():
        monkeypatch.setenv(name, value)
    leave_out_foreign_settings()
    assert not foreign.keys() & os.environ.keys()
    assert os.environ["NUMBA_CACHE_DIR"] == "here"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    leave_out_foreign_settings()
    assert os.environ["SOURCE_DATE_EPOCH"] == "1700000000"
