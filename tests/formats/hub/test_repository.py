"""What the hub says of a repository is held against what it can be: names, sizes, hashes, and lists in pages."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import MAIN, REPO, Answer, Fault, HubServer
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import HubError
from mq_quant.formats.hub.client import Hub
from mq_quant.formats.hub.repository import Remote, Repository, is_plain, parse_files

SHA1, SHA256 = "a" * 40, "b" * 64
SMALL = {"size": 1, "blobId": SHA1}
LARGE = {"size": 134, "blobId": SHA1, "lfs": {"sha256": SHA256, "size": 9}}
LONG = {"type": "file", "size": 9, "oid": SHA1, "lfs": {"oid": SHA256.upper(), "size": 9}}


@pytest.mark.parametrize(
    ("entry", "remote"),
    [
        ({"rfilename": "a", **SMALL}, Remote("a", 1, None, SHA1)),
        ({"path": "a", "type": "file", "size": 1, "oid": SHA1}, Remote("a", 1, None, SHA1)),
        ({"rfilename": "a", **LARGE}, Remote("a", 9, SHA256, None)),
        ({"path": "a", **LONG}, Remote("a", 9, SHA256, None)),
        ({"rfilename": "a", "size": 1, "lfs": None}, Remote("a", 1, None, None)),
        ({"rfilename": "a", "size": 1, "blobId": "../../x"}, Remote("a", 1, None, None)),
    ],
)
def test_both_lists_of_the_hub(entry: dict[str, Any], remote: Remote) -> None:
    assert parse_files("a/b", [entry]) == {"a": remote}


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"rfilename": 1, "size": 1},
        {"rfilename": "a", "size": -1},
        {"rfilename": "a", "size": True},
        {"rfilename": "a", "size": "1"},
        {"rfilename": "a", "size": 1.5},
        {"rfilename": "a", "size": 1, "lfs": []},
        {"rfilename": "a", "size": 1, "lfs": {"sha256": SHA256}},
        "a",
        None,
    ],
)
def test_entries_that_cannot_be(entry: Any) -> None:
    with pytest.raises(HubError, match=r"states no"):
        parse_files("a/b", [entry])


def test_folders_of_a_list_are_left_out() -> None:
    assert parse_files("a/b", [{"type": "directory", "path": "d", "oid": SHA1, "size": 0}]) == {}


def test_a_list_without_sizes_is_no_list() -> None:
    assert parse_files("a/b", [{"rfilename": "a"}]) is None


def test_a_file_that_is_stated_twice() -> None:
    entry = {"rfilename": "a", "size": 1, "blobId": SHA1}
    assert parse_files("a/b", [entry, entry])
    with pytest.raises(HubError, match="twice"):
        parse_files("a/b", [entry, {**entry, "size": 2}])


@pytest.mark.parametrize(
    "name", ["a", "a b.gguf", "déjà vu/模型.json", "a/b/c", ".gitattributes", "a..b", "x" * 255]
)
def test_names(name: str) -> None:
    assert is_plain(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "../a",
        "a/../b",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "a\0",
        "a\nb",
        "\x1b[2J",
        "a/" + "x" * 256,
        "\u202ea",
    ],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not is_plain(name)


@given(st.text(max_size=20))
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    if is_plain(name):
        assert Path("/f", name).resolve().is_relative_to("/f") and Path("/f", name) != Path("/f")


def test_unusable_files_are_refused_by_name() -> None:
    files = {n: Remote(n, 1, None, SHA1) for n in ("../a", "b")} | {"c": Remote("c", 1, None, None)}
    repository = Repository("a/b", MAIN, files)
    assert repository.file("b").size == 1
    for name, text in (("../a", "leads out"), ("c", "no hash"), ("d", "no such file")):
        with pytest.raises(HubError, match=text):
            repository.file(name)


def test_small_files_are_verified_by_their_git_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"what is up, doc?")
    git = "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert Remote("x", 16, None, git).lies_at(tmp_path / "x")
    assert not Remote("x", 16, None, "0" * 40).lies_at(tmp_path / "x")
    sha256 = hashlib.sha256(b"what is up, doc?").hexdigest()
    assert Remote("x", 16, sha256, "0" * 40).lies_at(tmp_path / "x")


def test_files_of_any_name_are_fetched(server: HubServer, tmp_path: Path) -> None:
    names = ("a b+c.gguf_file", "déjà vu/模型 100%.json", "q?x=1&y#z.json", "a;b,c='d'.json")
    server.repositories["acme/names"] = {MAIN: {name: name.encode() for name in names}}
    hub = Hub(server.endpoint, pause=0.001)
    repository = hub.resolve("acme/names")
    for i, name in enumerate(names):
        hub.download(repository, repository.file(name), tmp_path / str(i))
        assert (tmp_path / str(i)).read_text("utf-8") == name


@pytest.mark.parametrize("revision", ["v1.0", "feature/x", "refs/pr/7", "a b"])
def test_revisions_of_any_name(revision: str, server: HubServer) -> None:
    server.repositories[REPO][revision] = server.repositories[REPO][MAIN]
    with pytest.raises(HubError, match="states no commit"):  # this hub gives the revision's name back
        Hub(server.endpoint, pause=0.001).resolve(REPO, revision)


def test_a_commit_is_that_commit(server: HubServer) -> None:
    """Some mirrors have one revision and answer with it, whatever is asked for."""
    other = "2" * 40
    server.faults.append(
        Fault(
            "answer", "/api/", answer=lambda *_: Answer(200, hub_server.information(REPO, MAIN, {"a": b""}))
        )
    )
    server.repositories[REPO][other] = {}
    with pytest.raises(HubError, match=f"answers with revision {MAIN}, not with {other}"):
        Hub(server.endpoint, pause=0.001).resolve(REPO, other)


@pytest.mark.parametrize("page", [1, 3, 100])
def test_a_list_in_pages(page: int, server: HubServer) -> None:
    """A mirror whose short list lacks the sizes is asked for the long one, page after page."""
    hub = Hub(server.endpoint, pause=0.001)
    whole = hub.resolve(REPO)
    server.page = page
    assert hub.resolve(REPO) == whole
    pages = [r for r in server.requests if "/tree/" in r.path]
    assert len(pages) == -(-(len(whole.files) + 1) // page)


def test_pages_stay_with_the_endpoint(server: HubServer) -> None:
    """A mirror may pass on the public hub's addresses, to which its token and its files do not belong."""
    server.page = 3
    hub = Hub(server.endpoint, pause=0.001)
    real, server.endpoint = server.endpoint, "https://huggingface.example"
    assert len(hub.resolve(REPO).files) == len(server.repositories[REPO][MAIN])
    server.endpoint = real


def test_a_list_without_end(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq_quant.formats.hub.listing.LISTING_PAGES", 2)
    server.page = 1
    with pytest.raises(HubError, match="more than 2 pages"):
        Hub(server.endpoint, pause=0.001).resolve(REPO)


def test_a_list_beyond_reason(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq_quant.formats.hub.listing.LISTING_BYTES", 100)
    with pytest.raises(HubError, match="more than 100 bytes"):
        Hub(server.endpoint, pause=0.001).resolve(REPO)
