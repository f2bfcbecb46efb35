"""Compiled kernels appear under their content's name only when they are whole, whoever builds at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from mq_quant.formats import cache as disk
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.runtime.cache import KIND, cached, code, key


def folder():
    return disk.folder(KIND)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_keys_differ_where_parts_are_divided_otherwise():
    assert key(("ab", "c")) != key(("a", "bc")) != key(("abc",))
    assert key(("ab", b"c")) == key((b"ab", "c"))


def test_a_file_is_built_once():
    built = []

    def build(path: Path) -> None:
        built.append(path)
        path.write_bytes(b"code")

    assert cached("a.so", build) == cached("a.so", build) == folder() / "a.so"
    assert len(built) == 1
    assert built[0].parent != folder()
    assert [p.name for p in folder().iterdir()] == ["a.so"]


def test_builders_at_the_same_time_all_get_a_whole_file():
    together = Barrier(4)

    def build(path: Path) -> None:
        together.wait(timeout=30)
        path.write_bytes(b"x" * 100_000)

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: cached("b.so", build), range(4)))
    assert {p.read_bytes()[:-32] for p in paths} == {b"x" * 100_000}
    assert [p.name for p in folder().iterdir()] == ["b.so"]


def test_a_failed_build_leaves_nothing():
    def build(path: Path) -> None:
        path.write_bytes(b"half")
        raise BackendError("does not compile")

    with pytest.raises(BackendError, match="does not compile"):
        cached("c.so", build)
    assert list(folder().iterdir()) == []


@pytest.mark.parametrize("kept", [0, 3, -40, -1])
def test_a_torn_file_is_built_again(kept):
    def build(path: Path) -> None:
        path.write_bytes(b"x" * 1000)

    path = cached("d.so", build)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:kept])
    assert cached("d.so", build).read_bytes() == whole
    assert code("d.so", build) == b"x" * 1000


def test_a_folder_that_cannot_be_written_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = cached("e.so", lambda path: path.write_bytes(b"code") and None)
    assert path == tmp_path / ".cache" / "mq-quant" / "kernels" / "e.so"


def test_a_disk_that_is_full_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    def build(path: Path) -> None:
        if path.is_relative_to(tmp_path / "cache"):
            raise OSError(28, "No space left on device")
        path.write_bytes(b"code")

    assert code("f.so", build) == b"code"
    assert list(folder().iterdir()) == []


def test_where_nothing_can_be_written_the_places_are_named(monkeypatch):
    monkeypatch.setattr(disk, "private", lambda _: False)
    with pytest.raises(
        BackendError, match=r"no folder can be written\n  point XDG_CACHE_HOME at a folder.*/cache/"
    ):
        cached("g.so", lambda path: path.write_bytes(b"") and None)
