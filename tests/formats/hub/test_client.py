"""What a hub can do wrong: every fault of the server is survived, or ends in an error that names it."""

import dataclasses
import errno
import os
import threading
from pathlib import Path

import hub_server
import numpy as np
import pytest
from hub_fixtures import NOWHERE, SHARDS, Opener, names, read_all
from hub_server import MAIN, REPO, Fault, HubServer
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.checkpoint.streamed import open_hub
from mq_quant.formats.errors import CheckpointError, HubError
from mq_quant.formats.hub import transfer
from mq_quant.formats.hub.client import Hub
from mq_quant.formats.hub.files import fetch_file, fetch_files

pytestmark = pytest.mark.usefixtures("isolated")


def copied(fault: Fault) -> Fault:
    """Faults count down: each test needs its own."""
    return dataclasses.replace(fault)


PASSING = [
    Fault("status", "storage", 3, 503),
    Fault("status", "resolve", 2, 429),
    Fault("status", "api", 2, 500),
    Fault("status", "config.json", 2, 502),
    Fault("cut", "of-00004", 3, 1000),
    Fault("cut", "of-00004", 2, 0),
    Fault("cut", "config.json", 1, 10),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f"{f.kind}-{f.value}-{f.match}")
def test_opening_survives(fault: Fault, opened: Opener, server: HubServer, local: Checkpoint) -> None:
    fault = copied(fault)
    server.faults.append(fault)
    source = opened()
    source.validate()
    assert fault.times == 0
    assert source.tensors == local.tensors


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "storage", 3, 503),
        Fault("status", "resolve", 2, 429),
        Fault("cut", "of-00004", 3, 1000),
        Fault("flip", SHARDS[2], 2, 9000),
        Fault("long", SHARDS[0], 2),
        Fault("short", SHARDS[3], 2),
    ],
    ids=lambda f: f"{f.kind}-{f.value}-{f.match}",
)
def test_fetching_survives(fault: Fault, opened: Opener, server: HubServer, local: Checkpoint) -> None:
    fault = copied(fault)
    source = opened()
    server.faults.append(fault)
    read_all(source, local, sorted(names(source), key=lambda n: source.tensors[n].shard))
    assert fault.times == 0


def test_cut_downloads_are_resumed_where_they_ended(
    opened: Opener, server: HubServer, local: Checkpoint
) -> None:
    source = opened()
    server.faults.append(Fault("cut", SHARDS[0], 1, 5000))
    name = next(n for n in names(source) if source.tensors[n].shard == SHARDS[0])
    assert np.array_equal(source.weight(name), local.weight(name))
    size = source._repository.file(SHARDS[0]).size
    assert [r.range for r in server.requests if r.path.endswith(SHARDS[0])][-1] == f"bytes=5000-{size - 1}"


def test_slow_link(opened: Opener, server: HubServer, local: Checkpoint) -> None:
    source = opened()
    server.bytes_per_second = 4e6
    read_all(source, local, names(source)[:30])


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("status", "storage", 99, 503), r"the hub answered 503 \(7 attempts\)"),
        (Fault("status", "storage", 99, 403), "the hub answered 403"),
        (Fault("status", "storage", 99, 404), "the hub answered 404|no such"),
        (Fault("cut", "of-00004", 99, 0), "connection"),
        (Fault("flip", SHARDS[0], 99, 9000), "its hash is .* not what the hub states"),
        (Fault("long", SHARDS[0], 99), "more bytes came than the hub states"),
        (Fault("short", SHARDS[0], 99), "the connection ended after"),
        (Fault("commit", SHARDS[0], 99), "answered for revision ffffffffffff"),
    ],
    ids=lambda f: f.kind if isinstance(f, Fault) else "",
)
def test_gives_up_with_a_named_error(fault: Fault, text: str, opened: Opener, server: HubServer) -> None:
    source = opened()
    server.faults.append(copied(fault))
    name = next(n for n in names(source) if source.tensors[n].shard == SHARDS[0])
    with pytest.raises(HubError, match=text) as e:
        source.weight(name)
    assert SHARDS[0] in str(e.value)
    server.faults.clear()
    assert np.isfinite(source.weight(name)).all(), "a fault that has passed is not remembered"


def test_close_interrupts_a_download(opened: Opener, server: HubServer) -> None:
    source = opened()
    server.bytes_per_second = 2e5
    asked = threading.Event()
    server.faults.append(Fault("hook", "/storage/", call=asked.set))
    source.schedule(names(source))
    assert asked.wait(10)
    source.close()
    with pytest.raises(HubError, match="closed"):
        source.weight(names(source)[0])


def test_revision_that_vanished(opened: Opener, server: HubServer) -> None:
    source = opened()
    server.repositories[REPO] = {"2" * 40: {}}
    with pytest.raises(HubError, match="no such revision"):
        source.weight(names(source)[0])


def test_token_comes_from_the_environment_and_stays_on_the_hub(
    opened: Opener, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "hf_secret"
    with pytest.raises(HubError, match="set HF_TOKEN") as e:
        opened()
    assert "hf_secret" not in str(e.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    opened().weight("model.norm.weight")
    answered = [r for r in server.requests if r.token == "Bearer hf_secret"]
    assert answered
    assert not any(r.path.startswith("/storage/") for r in answered), "the storage host never sees the token"


def test_endpoint_comes_from_the_environment(
    server: HubServer, local: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.chdir(tmp_path)
    source = open_hub(REPO)
    assert np.array_equal(source.weight("model.norm.weight"), local.weight("model.norm.weight"))
    assert source.disk_bytes() > 0
    source.close()
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_single_files(server: HubServer, tmp_path: Path) -> None:
    server.repositories["acme/imatrix"] = {MAIN: {"imatrix.gguf_file": b"GGUF" * 100}}
    hub = Hub(server.endpoint, pause=0.001)
    path = fetch_file("acme/imatrix", "imatrix.gguf_file", hub=hub)
    assert path.read_bytes() == b"GGUF" * 100
    assert MAIN in path.parts
    found = fetch_files(REPO, ("config.json", "tokenizer.json", "chat_template.jinja"), hub=hub)
    assert set(found) == {"config.json", "tokenizer.json"}
    assert {p.name for p in found["config.json"].parent.iterdir()} == set(found)
    path.resolve().write_bytes(b"GGUF" * 99 + b"oops")
    assert fetch_file("acme/imatrix", "imatrix.gguf_file", hub=hub).read_bytes() == b"GGUF" * 100
    path.resolve().write_bytes(b"GGUF" * 99 + b"oops")
    server.faults.append(Fault("flip", "imatrix.gguf_file", 99, 7))
    with pytest.raises(HubError, match=r"its hash is .* not what the hub states"):
        fetch_file("acme/imatrix", "imatrix.gguf_file", hub=hub)
    with pytest.raises(HubError, match="no such file"):
        fetch_file("acme/imatrix", "other", hub=hub)


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>please log in</html>",
        b"[]",
        b"{}",
        b'{"id": 1, "siblings": [{}]}',
        b'{"id": "a", "sha": "../../../tmp", "siblings": [{"rfilename": "config.json", "size": 1}]}',
        b'{"id": "a", "sha": "1111111111111111111111111111111111111111", "siblings": []}',
        b'{"id": "a", "sha": "1111111111111111111111111111111111111111", "siblings": [{"rfilename": "a", "size": -1}]}',
        b'{"id": "a", "siblings": [{"rfilename": "a", "size": 1, "lfs": {}}]}',
    ],
)
def test_answers_that_are_no_hub(
    answer: bytes, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_server, "information", lambda *_: answer)
    with pytest.raises(HubError, match=r"web page|does not speak|states no"):
        open_hub(REPO, hub=Hub(server.endpoint, pause=0.001), scratch=tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


def test_no_such_repository(server: HubServer, tmp_path: Path) -> None:
    for name, text in (("acme/nothing", "no such repository"), ("a/b/c", "owner/name"), ("..", "owner/name")):
        with pytest.raises(HubError, match=text):
            open_hub(name, hub=Hub(server.endpoint, pause=0.001), scratch=tmp_path)
    with pytest.raises(HubError, match="cannot hold any"):
        open_hub(REPO, shard_cache=0)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"connection failed.*7 attempts"):
        open_hub(REPO, hub=Hub(NOWHERE, pause=0.001), scratch=tmp_path)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "larger than this system"),
        (errno.EIO, "cannot be stored: Input/output error"),
        (errno.EROFS, "cannot be stored: Read-only"),
    ],
)
def test_a_disk_that_cannot_take_a_shard(
    code: int, text: str, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened()

    def refused(path: Path, *_: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(transfer, "_open", refused)
    with pytest.raises(HubError, match=text):
        source.weight("model.norm.weight")


def test_a_link_where_a_shard_is_to_lie_is_not_followed(
    opened: Opener, server: HubServer, local: Checkpoint, tmp_path: Path
) -> None:
    source = opened()
    mine = tmp_path / "mine"
    mine.write_text("my text")
    for name in (SHARDS[0], f"{SHARDS[0]}.part"):
        (source.scratch / name).symlink_to(mine)
    name = next(n for n in names(source) if source.tensors[n].shard == SHARDS[0])
    assert np.array_equal(source.weight(name), local.weight(name))
    assert mine.read_text() == "my text"


def test_a_shard_that_changes_after_its_check_is_not_used(opened: Opener, server: HubServer) -> None:
    """In the cache of huggingface_hub other programs write, too."""
    path = fetch_file(REPO, SHARDS[0], hub=Hub(server.endpoint, pause=0.001))
    source = opened()
    first, second = [n for n in names(source) if source.tensors[n].shard == SHARDS[0]][:2]
    source.weight(first)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    with pytest.raises(CheckpointError, match="changed after"):
        source.weight(second)


def test_waiting_is_told_by_pythons_logging(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a handler of its own, a program then sees the line on stderr."""
    monkeypatch.setattr("mq_quant.formats.hub.patience.SPEAK", 0.0)
    server.faults.append(Fault("status", "api", 1, 503))
    Hub(server.endpoint, pause=0.001).resolve(REPO)
    assert f"{REPO}: the hub answered 503 at {server.endpoint}" in caplog.text
