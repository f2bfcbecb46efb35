"""huggingface_hub's cache: its layout is kept, what lies in it is checked, and links are optional."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hub_server import MAIN, REPO, HubServer
from huggingface_hub import constants, try_to_load_from_cache
from mq_quant.formats.errors import HubError
from mq_quant.formats.hub.cache import _passing_folder, cached, fetched, is_broken, snapshot_of
from mq_quant.formats.hub.client import Hub
from mq_quant.formats.hub.files import fetch_file
from mq_quant.formats.hub.repository import Repository


@pytest.fixture
def hub(server: HubServer) -> Hub:
    return Hub(server.endpoint, pause=0.001)


@pytest.fixture
def repository(hub: Hub) -> Repository:
    return hub.resolve(REPO)


def folder() -> Path:
    return Path(constants.HF_HUB_CACHE) / "models--acme--small-m2"


def no_links(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_the_layout_is_huggingface_hubs(
    links: bool, hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "symlink", no_links)
        monkeypatch.setattr(os, "link", no_links)
    remote = repository.file("config.json")
    path = fetched(hub, repository, remote)
    assert path == folder() / "snapshots" / MAIN / "config.json"
    assert path.is_symlink() is links
    assert try_to_load_from_cache(REPO, "config.json", revision=MAIN) == str(path)
    assert [p.name for p in (folder() / "blobs").iterdir()] == ([remote.expected] if links else [])
    if links:
        assert os.readlink(path) == f"../../blobs/{remote.expected}"  # noqa: PTH115


def test_a_file_that_is_there_is_not_fetched_again(
    hub: Hub, repository: Repository, server: HubServer
) -> None:
    remote = repository.file("config.json")
    assert cached(repository, remote) is None
    fetched(hub, repository, remote)
    before = len(server.requests)
    assert fetched(hub, repository, remote) == cached(repository, remote)
    assert len(server.requests) == before


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("broken", [b"", b"{}", None])
def test_a_file_that_changed_on_the_disk_is_fetched_again(
    links: bool, broken: bytes | None, hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "symlink", no_links)
    remote = repository.file("config.json")
    path = fetched(hub, repository, remote)
    good = path.read_bytes()
    if broken is None:
        path.resolve().unlink()
    else:
        path.resolve().write_bytes(broken)
    assert cached(repository, remote) is None
    assert fetched(hub, repository, remote).read_bytes() == good


def test_other_users_of_a_blob_see_old_bytes_or_new_ones(hub: Hub, repository: Repository) -> None:
    """A blob is replaced as a whole, never written in place."""
    remote = repository.file("config.json")
    path = fetched(hub, repository, remote)
    path.resolve().write_bytes(b"broken")
    with path.open("rb") as reader:
        fetched(hub, repository, remote)
        assert reader.read() == b"broken"


@pytest.mark.parametrize("links", [True, False])
def test_many_at_once(links: bool, hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "symlink", no_links)
    remote, faults = repository.file("tokenizer.json"), list[BaseException]()

    def work() -> None:
        try:
            assert remote.lies_at(fetched(hub, repository, remote))
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults


@pytest.mark.parametrize("where", ["a file", "~/.cache/huggingface/hub"])
def test_a_cache_that_cannot_be_written(
    where: str, server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files then lie in a folder of this process's own, and one line says so."""
    (tmp_path / "a file").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", where)
    _passing_folder.cache_clear()
    said = list[str]()
    hub = Hub(server.endpoint, pause=0.001, notify=said.append)
    repository = hub.resolve(REPO)
    remote = repository.file("config.json")
    path = fetched(hub, repository, remote)
    assert remote.lies_at(path) and path == fetched(hub, repository, remote)
    assert not path.is_relative_to(tmp_path) and cached(repository, remote) is None
    assert "HF_HOME" in said[0]
    assert sum(r.path.endswith("config.json") for r in server.requests) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]


def test_no_folder_can_be_written(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("mq_quant.formats.hub.cache._passing_folder", lambda: tmp_path / "file")
    hub = Hub(server.endpoint, pause=0.001, notify=lambda _: None)
    repository = hub.resolve(REPO)
    with pytest.raises(HubError, match="cannot be stored") as e:
        fetched(hub, repository, repository.file("config.json"))
    assert "HF_HOME" in str(e.value)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        (f"models--acme--small-m2/snapshots/{MAIN}", ("acme/small-m2", MAIN)),
        (f"models--small/snapshots/{MAIN}", ("small", MAIN)),
        (f"models--a--b--c/snapshots/{MAIN}", None),
        (f"models--/snapshots/{MAIN}", None),
        (f"datasets--a--b/snapshots/{MAIN}", None),
        ("models--a--b/snapshots/main", None),
        (f"models--a--b/{MAIN}", None),
        ("x", None),
    ],
)
def test_snapshots(path: str, known: tuple[str, str] | None, tmp_path: Path) -> None:
    (tmp_path / path).mkdir(parents=True)
    assert snapshot_of(tmp_path / path) == known
    (tmp_path / "link").symlink_to(tmp_path / path)
    assert snapshot_of(tmp_path / "link") == known


def test_a_broken_blob_is_not_used_offline(
    hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = ("config.json", "model-00001-of-00004.safetensors")
    for name in names:
        path = fetched(hub, repository, repository.file(name))
        assert not is_broken(path)
        assert fetch_file(REPO, name, MAIN) == path
        path.resolve().write_bytes(b"{}")
        assert is_broken(path)
        with pytest.raises(HubError, match="not those of its hash") as e:
            fetch_file(REPO, name, MAIN)
        assert name in str(e.value)
    plain = path.with_name("plain")
    plain.write_text("no link")
    assert not is_broken(plain)
