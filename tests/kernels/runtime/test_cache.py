"""Compiled kernels appear under their content's name only when they are whole, whoever builds at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.runtime.cache import cached, folder, key


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
    assert {p.read_bytes() for p in paths} == {b"x" * 100_000}
    assert [p.name for p in folder().iterdir()] == ["b.so"]


def test_a_failed_build_leaves_nothing():
    def build(path: Path) -> None:
        path.write_bytes(b"half")
        raise BackendError("does not compile")

    with pytest.raises(BackendError, match="does not compile"):
        cached("c.so", build)
    assert list(folder().iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="point XDG_CACHE_HOME at a writable folder"):
        cached("d.so", lambda path: path.write_bytes(b"") and None)


def test_without_xdg_the_cache_lies_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "mq-quant" / "kernels"
