"""publish: nothing is sent that was not listed or does not verify, and what has arrived is not sent again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import publish_server
import pytest
from hub_server import Fault
from huggingface_hub import constants
from huggingface_hub.utils import _http
from mq_quant.formats.errors import CheckError, HubError, InputError
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.publish.folder import list_folder
from mq_quant.quantize.publish.upload import UploadOptions, upload
from mq_quant.quantize.spec.recipe import load_tier
from publish_server import PublishServer
from watching import Heard

# huggingface_hub hands files to its HTTP client in a way that the client has begun to call old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "acme/tiny-hfq"
TOKEN = "hf_" + "a" * 20
MADE = {"README.md", "SHA256SUMS", "tiny.mq2.recipe.yaml", "tiny.mq3.recipe.yaml"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiers of the tiny source in a folder."""
    folder = tmp_path_factory.mktemp("built")
    for tier in ("mq2", "mq3"):
        build_file(load_tier(tier, "tiny"), options=RunOptions(folder / f"tiny.{tier}", 2))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "out")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PublishServer]:
    """An empty hub, as the only one that can be reached; huggingface_hub's pauses between attempts take no time."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with publish_server.serve(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damage(path: Path) -> None:
    with path.open("r+b") as f:
        f.seek(-100, 2)
        f.write(b"\xff" * 50)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_file_that_does_not_verify_is_refused_without_force(
    folder: Path, hub: PublishServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "tiny.mq2")
    line = ["publish", str(folder), REPO]
    for extra, code in (([], 1), (["--dry-run"], 1)):
        with pytest.raises(SystemExit) as ended:
            main([*line, *extra])
        assert ended.value.code == code
        assert "is not published: tiny.mq2: " in capsys.readouterr().err
    assert not hub.requests
    with pytest.raises(SystemExit) as ended:
        main([*line, "--force", "--json"])
    assert ended.value.code == 0 and "tiny.mq2" in json.loads(capsys.readouterr().out)["sent"]


def test_sums_that_say_something_else_are_a_problem(folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text(f"{digest(folder / 'tiny.mq2')}  tiny.mq2\n{'0' * 64}  tiny.mq4\n")
    problems = list_folder(folder, REPO).problems
    assert problems == (
        "tiny.mq3: is not in SHA256SUMS",
        "tiny.mq4: is in SHA256SUMS, and not in the folder",
    )
    sums.write_text(f"{'0' * 64}  tiny.mq2\n{digest(folder / 'tiny.mq3')}  tiny.mq3\n")
    with pytest.raises(CheckError, match=r"tiny\.mq2: is not the file that SHA256SUMS states"):
        list_folder(folder, REPO).raise_if_bad()


def test_folders_without_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(InputError, match="holds no HFQ file"):
        list_folder(tmp_path, REPO)
    with pytest.raises(InputError, match="is not a folder"):
        list_folder(tmp_path / "none", REPO)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/x", "x/"])
def test_a_repository_has_an_owner_and_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["publish", ".", name])
    assert ended.value.code == 2 and "owner/name" in capsys.readouterr().err


def test_without_a_token_or_a_network_nothing_begins(
    folder: Path, hub: PublishServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = list_folder(folder, REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        upload(listing)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="needs a token"):
        upload(listing)
    assert not hub.requests


def test_a_public_repository_is_not_taken_for_a_private_one(folder: Path, hub: PublishServer) -> None:
    hub.repositories[REPO], hub.private[REPO] = {"main": {}}, False
    listing = list_folder(folder, REPO)
    with pytest.raises(HubError, match="is public, and a private upload was asked for"):
        upload(listing)
    assert not hub.commits and not hub.blobs
    assert upload(listing, UploadOptions(public=True)).private is False


# --- what is sent --------------------------------------------------------------------------------------------------


def test_exactly_what_is_listed_is_sent(folder: Path, hub: PublishServer) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / ".token").write_text(TOKEN)
    (folder / "more").mkdir()
    (folder / "more" / "x.json").write_text("{}")
    (folder / "tiny.mq4.partial").write_bytes(b"HFQM")
    (folder / "report.html").write_text("<p>")
    before = sorted(path.name for path in folder.iterdir())
    listing = list_folder(folder, REPO)
    assert [item.name for item in listing.items][:2] == ["tiny.mq2", "tiny.mq3"]
    assert listing.items[-1].name == "README.md"
    assert {line.partition(":")[0] for line in listing.left_out} == {
        "notes.txt", ".token", "more", "tiny.mq4.partial",
    }  # fmt: skip
    heard = Heard()
    result = upload(listing, watch=heard)
    files = hub.repositories[REPO]["main"]
    assert (
        set(files) == {item.name for item in listing.items} == {*MADE, "tiny.mq2", "tiny.mq3", "report.html"}
    )
    for item in listing.items:
        assert hashlib.sha256(files[item.name]).hexdigest() == item.sha256
        assert len(files[item.name]) == item.size
    assert hub.commits == [["tiny.mq2"], ["tiny.mq3"], [item.name for item in listing.items[2:]]]
    assert result.private and hub.private[REPO] and result.sent_bytes == listing.size
    assert heard.phase("uploading") == (listing.size, 0, listing.size)
    assert sorted(path.name for path in folder.iterdir()) == before
    sums = files["SHA256SUMS"].decode().splitlines()
    assert set(sums) == {f"{digest(folder / name)}  {name}" for name in ("tiny.mq2", "tiny.mq3")}


def test_what_lies_in_the_folder_is_taken_as_it_is(folder: Path, hub: PublishServer) -> None:
    (folder / "tiny.mq2.recipe.yaml").write_text("mine")
    assert any("licence" in note for note in list_folder(folder, REPO).notes)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    listing = list_folder(folder, REPO)
    assert listing.notes == ()
    assert {item.name for item in listing.items if item.file is None} == MADE - {
        "README.md", "tiny.mq2.recipe.yaml",
    }  # fmt: skip
    upload(listing)
    assert hub.repositories[REPO]["main"]["README.md"].endswith(b"mine")


def test_the_same_again_sends_nothing(folder: Path, hub: PublishServer) -> None:
    upload(list_folder(folder, REPO))
    sent, commits = list(hub.received), list(hub.commits)
    again = upload(list_folder(folder, REPO))
    assert (hub.received, hub.commits) == (sent, commits)
    assert again.sent == () and len(again.kept) == 6 and again.sent_bytes == 0


def test_a_file_that_changes_after_it_was_listed_is_not_committed(folder: Path, hub: PublishServer) -> None:
    listing = list_folder(folder, REPO)

    def change(name: str) -> None:
        if name == "tiny.mq3":
            damage(folder / "tiny.mq3")

    with pytest.raises((InputError, HubError)):
        upload(listing, watch=Heard(then=change))
    assert hub.commits == [["tiny.mq2"]]


def test_large_files_go_in_parts(folder: Path, hub: PublishServer) -> None:
    hub.part_bytes = 5_000_000
    upload(list_folder(folder, REPO))
    assert hub.repositories[REPO]["main"]["tiny.mq2"] == (folder / "tiny.mq2").read_bytes()
    assert sum("/" in name for name in hub.received) == 3 + 3


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "/upload/", value=503),
        Fault("status", "/upload/", times=2, value=500),
        Fault("cut", "/upload/", value=1000),
        Fault("status", "/preupload/", value=502),
        Fault("status", "objects/batch", value=429),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.value}",
)
def test_what_passes_is_tried_again(fault: Fault, folder: Path, hub: PublishServer) -> None:
    hub.faults.append(fault)
    upload(list_folder(folder, REPO))
    assert fault.times == 0 and "README.md" in hub.repositories[REPO]["main"]


@pytest.mark.parametrize(
    ("fault", "says", "hint"),
    [
        (Fault("status", "/repos/create", value=401), "the hub answered 401", "HF_TOKEN"),
        (Fault("status", "/repos/create", value=404), "the hub answered 404", "check the name"),
        (Fault("status", "/commit/", value=403), "the hub answered 403", "may not write"),
        (
            Fault("status", "/upload/", times=99, value=503),
            "the hub answered 503",
            "run the same command again",
        ),
        (Fault("status", "/upload/", value=413), "the hub answered 413", "no file of this size"),
        (Fault("status", "/verify", value=400), "the hub answered 400", "words say"),
        (
            Fault("answer", "/preupload/", answer=lambda *_: publish_server.page()),
            "makes no sense",
            "something else than a hub",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_pass_is_an_error_with_advice(
    fault: Fault, says: str, hint: str, folder: Path, hub: PublishServer
) -> None:
    listing = list_folder(folder, REPO)
    hub.faults.append(fault)
    with pytest.raises(HubError, match=says) as refused:
        upload(listing)
    assert hint in str(refused.value) and "hf_abc" not in str(refused.value)
    fault.times = 0
    upload(listing)
    assert set(hub.repositories[REPO]["main"]) >= {"tiny.mq2", "tiny.mq3", "README.md"}


def test_an_upload_that_broke_off_continues_with_what_is_missing(folder: Path, hub: PublishServer) -> None:
    listing = list_folder(folder, REPO)
    fault = Fault("status", "/upload/" + listing.items[1].sha256, times=99, value=503)
    hub.faults.append(fault)
    with pytest.raises(HubError):
        upload(listing)
    assert hub.commits == [["tiny.mq2"]]
    fault.times = 0
    before = len(hub.received)
    result = upload(listing)
    assert result.kept == ("tiny.mq2",)
    assert listing.items[0].sha256 not in hub.received[before:]


def test_what_the_storage_has_is_not_sent_again_though_no_commit_names_it(
    folder: Path, hub: PublishServer
) -> None:
    listing = list_folder(folder, REPO)
    fault = Fault("status", "/commit/", times=1, value=403)
    hub.faults.append(fault)
    with pytest.raises(HubError):
        upload(listing)
    assert not hub.commits
    upload(listing)
    assert hub.received.count(listing.items[0].sha256) == 1


def test_a_hub_that_is_not_there_is_an_error(
    folder: Path, hub: PublishServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="the connection failed"):
        upload(list_folder(folder, REPO))


def test_a_dry_run_asks_nobody(folder: Path, hub: PublishServer, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["publish", str(folder), REPO, "--dry-run", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and not hub.requests
    assert said["bytes"] == sum(file["bytes"] for file in said["files"])
    assert {file["name"] for file in said["files"]} == {*MADE, "tiny.mq2", "tiny.mq3"}
