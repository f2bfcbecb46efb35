"""Compiled loops are kept under the digest of their sources, checked before they are loaded, and never needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mq_quant.formats import jit
from mq_quant.lloyd import loops

SCRIPT = """
import sys
from pathlib import Path
from mq_quant.formats.jit import compiler
compiled = compiler(Path(sys.argv[1]))

@compiled
def twice(x):
    return x + x

print(twice(21), twice(0.5), twice._cache.cache_path)
print(sum(twice.stats.cache_hits.values()))
"""


def twice(source: Path, **environment: str) -> tuple[str, int]:
    """The folder of compiled code, and how many of two signatures came from it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, hits = done.stdout.splitlines()
    assert said.startswith("42 1.0 ")
    return said.removeprefix("42 1.0 "), int(hits)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": ""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "room" / "shelf").mkdir(parents=True)
    (tmp_path / "room" / "shelf" / "nested.py").write_text("A = 1\n")
    return tmp_path / "room"


def test_code_is_kept_until_a_source_changes_however_deep(source: Path, settings: dict[str, str]) -> None:
    folder, hits = twice(source, **settings)
    assert Path(folder) == Path(settings["XDG_CACHE_HOME"]) / "mq-quant" / "loops" and hits == 0
    assert twice(source, **settings)[1] == 2
    (source / "shelf" / "nested.py").write_text("A = 2\n")
    assert twice(source, **settings)[1] == 0
    (source / "shelf" / "nested.py").write_text("A = 1\n")
    assert twice(source, **settings)[1] == 2


@pytest.fixture
def compiled(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many of two signatures come from `tmp_path`, as a function that is compiled, or loaded, each time anew."""
    monkeypatch.setattr(jit, "folder", lambda: tmp_path)

    def hits() -> int:
        def double(x):  # type: ignore[no-untyped-def]
            return x + x

        function = jit.compiler(source)(double)
        assert (function(21), function(0.5)) == (42, 1.0)
        return sum(function.stats.cache_hits.values())

    return hits


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_torn_code_is_compiled_again(compiled: Callable[[], int], tmp_path: Path, kept: int) -> None:
    assert [compiled(), compiled()] == [0, 2]
    files = sorted(tmp_path.glob("*.nbc"))
    for path in files:
        path.write_bytes(path.read_bytes()[:kept])
    assert len(files) == 2
    assert [compiled(), compiled()] == [0, 2]


def test_code_that_others_may_have_written_is_not_loaded(compiled: Callable[[], int], tmp_path: Path) -> None:
    assert [compiled(), compiled()] == [0, 2]
    for path in tmp_path.glob("*.nbc"):
        path.chmod(0o666)
    assert [compiled(), compiled()] == [0, 2]


def test_the_variable_of_numba_names_the_place_if_it_can_be_written(
    source: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    there = settings | {"NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    assert twice(source, **there)[0] == str(tmp_path / "numba" / "mq-quant" / "loops")
    nowhere = settings | {"NUMBA_CACHE_DIR": "/dev/null/numba"}
    assert twice(source, **nowhere)[0] == str(tmp_path / "cache" / "mq-quant" / "loops")


def test_without_any_place_code_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "folder", lambda: None)

    def thrice(x):  # type: ignore[no-untyped-def]
        return 3 * x

    function = jit.compiler(Path(__file__))(thrice)
    assert function(2) == 6
    assert not function.stats.cache_hits


def test_the_sources_of_the_room_are_all_of_it() -> None:
    names = {path.name for path in jit._files((Path(loops.__file__).parent,))}
    assert {"loops.py", "constants.py", "group.py", "vec.py", "descent.py", "kmeans.py"} <= names


INLINED = """
import sys
from pathlib import Path
import numpy as np
from mq_quant.formats.jit import compiler
compiled, inlined = (compiler(Path(sys.argv[1]), inlined=choice) for choice in (False, True))

@compiled
def total(x):
    room = np.empty((3, 5), np.int16)
    room[:] = x[0]
    return room.sum()

@inlined
def add(x, by):
    for i in range(len(x)):
        x[i] += by + 0 * total(x)

@compiled
def twice(x):
    add(x, 1)
    add(x, 2)

numbers = np.arange(3)
twice(numbers)
print(numbers)
"""


def test_functions_that_an_inlined_loop_calls_may_make_arrays(source: Path, settings: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INLINED, str(source)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[3 4 5]\n"
