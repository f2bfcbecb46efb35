"""Caches of code: closed to others whatever the umask, checked at every use, and never needed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mq_quant.formats import cache


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.usefixtures("_open_umask")
def test_nothing_is_open_to_others_under_any_umask(home: Path) -> None:
    folder = cache.folder("kernels")
    assert folder == home / "cache" / "mq-quant" / "kernels"
    cache.write(folder / "a", b"code")
    assert {mode(p) for p in (folder.parents[1], folder.parent, folder)} == {0o700}
    assert mode(folder / "a") == 0o600
    assert cache.read(folder / "a") == b"code"


def test_a_folder_that_was_open_is_closed(home: Path) -> None:
    folder = home / "cache" / "mq-quant"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cache.private(folder) and mode(folder) == 0o700


def test_a_place_that_anybody_may_replace_is_not_taken(home: Path) -> None:
    (home / "cache").mkdir()
    (home / "cache").chmod(0o777)
    assert cache.folder("kernels") == home / "home" / ".cache" / "mq-quant" / "kernels"
    (home / "cache").chmod(0o1777)
    assert cache.folder("kernels") == home / "cache" / "mq-quant" / "kernels"


def test_a_folder_of_another_user_is_not_taken(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    folder = cache.folder("kernels")
    cache.write(folder / "a", b"code")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert not cache.private(folder)
    assert cache.read(folder / "a") is None


def test_a_link_of_this_user_is_followed(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / "disk").mkdir()
    (home / "cache").mkdir()
    (home / "cache" / "mq-quant").symlink_to(home / "disk")
    assert cache.folder("kernels") == home / "cache" / "mq-quant" / "kernels"
    (home / "disk" / "kernels" / "a").symlink_to("/etc/passwd")
    assert cache.read(home / "disk" / "kernels" / "a") is None
    user = os.geteuid()
    real = Path.lstat

    def theirs(path: Path) -> os.stat_result:
        about = list(real(path))
        about[stat.ST_UID] = user + stat.S_ISLNK(about[stat.ST_MODE])
        return os.stat_result(about)

    monkeypatch.setattr(Path, "lstat", theirs)
    assert not cache.private(home / "cache" / "mq-quant")


@pytest.mark.parametrize("bad", ["torn", "empty", "longer", "one bit", "open to others", "a folder"])
def test_a_file_that_is_not_whole_or_not_ours_alone_is_missing(home: Path, bad: str) -> None:
    path = cache.folder("kernels") / "a"
    cache.write(path, b"code" * 100)
    data = path.read_bytes()
    if bad == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif bad == "empty":
        path.write_bytes(b"")
    elif bad == "longer":
        path.write_bytes(data + b"\0")
    elif bad == "one bit":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif bad == "open to others":
        path.chmod(0o620)
    else:
        path.unlink()
        path.mkdir()
    assert cache.read(path) is None


def test_a_file_appears_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    folder = cache.folder("kernels")
    cache.write(folder / "a", b"")
    assert cache.read(folder / "a") == b"" and cache.read(folder / "b") is None

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cache.write(folder / "b", b"code")
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_where_the_home_cannot_be_written_temporary_files_serve(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setenv("HOME", "/dev/null/home")
    own = home / "tmp" / f"mq-quant-{os.geteuid()}"
    assert cache.folder("loops") == own / "loops" and mode(own) == 0o700


def test_a_relative_cache_home_is_none(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache.folder("loops") == home / "home" / ".cache" / "mq-quant" / "loops"


SCRIPT = """
import os
from pathlib import Path
from mq_quant.formats import cache
places = [Path(os.environ["TMPDIR"]) / f"mq-quant-{os.geteuid()}"]
cache.places = lambda: iter(places)
places[0].write_text("somebody was here first")
folder = cache.folder("loops")
cache.write(folder / "a", b"code")
print(folder)
"""


def test_the_last_resort_is_a_folder_that_goes_with_the_process(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.parents[1] == home / "tmp" and not folder.exists()
    assert [p.name for p in (home / "tmp").iterdir()] == [f"mq-quant-{os.geteuid()}"]


def test_without_any_place_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "private", lambda _: False)
    assert cache.folder("loops") is None
