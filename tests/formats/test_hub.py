"""Checkpoints streamed from a hub: a real HTTP server on loopback, its faults, and what stays on the disk."""

import dataclasses
import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import numpy as np
import pytest
import small_model
from hub_server import MAIN, REPO, Fault, HubServer
from huggingface_hub import constants
from mq_quant.formats import hubclient
from mq_quant.formats.checkpoint import Checkpoint, Source, open_checkpoint
from mq_quant.formats.errors import CheckpointError, ConfigError, HubError
from mq_quant.formats.hub import HubCheckpoint, fetch_file, fetch_side_files, open_hub
from mq_quant.formats.hubclient import Hub, Remote
from mq_quant.formats.minimax import inventory

SHARDS = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
INDEX = "model.safetensors.index.json"
NOWHERE = "http://127.0.0.1:9"
"""What stands in for the public hub, so that no request can leave this machine."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        small_model.save(tmp_path_factory.mktemp("m") / "m", small_model.tensors(), shards=4)
    )


@pytest.fixture
def server(local: Checkpoint) -> Iterator[HubServer]:
    with hub_server.serve({REPO: {MAIN: hub_server.repository(local.path)}}) as hub:
        yield hub


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of huggingface_hub's, and none of the environment's settings."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    template = NOWHERE + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


Opener = Callable[..., HubCheckpoint]


@pytest.fixture
def opened(server: HubServer, tmp_path: Path) -> Iterator[Opener]:
    sources: list[Source] = []

    def make(shard_cache: int = 2, revision: str | None = None) -> HubCheckpoint:
        hub = Hub(server.endpoint, pause=0.001)
        source = open_hub(REPO, revision, shard_cache, scratch=tmp_path / "scratch", hub=hub)
        assert isinstance(source, HubCheckpoint)
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()
    assert not list((tmp_path / "scratch").glob("*")), "the scratch folder is not removed"


def names(source: Source) -> list[str]:
    return [spec.name for spec in inventory(source.config)]


def stored(scratch: Path) -> int:
    return sum(p.stat().st_size for p in scratch.rglob("*") if p.is_file())


def read_all(source: Source, local: Checkpoint, order: list[str]) -> None:
    source.schedule(order)
    for name in order:
        assert np.array_equal(source.weight(name), local.weight(name)), name
        source.release(name)


def test_validates_before_any_shard_is_fetched(opened: Opener, server: HubServer) -> None:
    source = opened()
    source.validate()
    bodies = [
        r for r in server.requests if r.method == "GET" and ".safetensors" in r.path and "index" not in r.path
    ]
    assert len(bodies) == 2 * len(SHARDS), "one redirect and one ranged read of the header per shard"
    assert all(r.range for r in bodies)


def test_is_the_local_checkpoint(opened: Opener, local: Checkpoint) -> None:
    source = opened()
    assert source.origin == {"repository": REPO, "revision": MAIN}
    assert source.raw_config == local.raw_config
    assert source.config == local.config
    assert source.tensors == local.tensors
    assert source.shards == local.shards
    assert source.fingerprint() == local.fingerprint()
    assert source.side_file("chat_template.jinja") is None
    tokenizer = source.side_file("tokenizer.json")
    assert tokenizer is not None and tokenizer.read_text() == "{}"
    embed = "model.embed_tokens.weight"
    assert np.array_equal(source.rows(embed, 3, 9), local.weight(embed)[3:9])
    with pytest.raises(ValueError, match="not a side file"):
        source.side_file("modeling.py")


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_each_shard_is_fetched_once_and_deleted(
    slots: int, opened: Opener, server: HubServer, local: Checkpoint, tmp_path: Path
) -> None:
    source = opened(slots)
    before = len(server.requests)
    shard_order = sorted(names(source), key=lambda n: source.tensors[n].shard)
    straddling = [n for n in shard_order if len(source._shards_of(n)) == 2]
    assert slots > 1 or len(straddling) <= 1
    read_all(source, local, shard_order)
    fetched = [r.path for r in server.requests[before:] if r.path.startswith("/storage/")]
    assert [p.rsplit("/", 1)[1] for p in fetched] == SHARDS if slots > 1 else len(fetched) >= 4
    assert stored(tmp_path / "scratch") == 0


@pytest.mark.parametrize("slots", [1, 2])
def test_any_order_and_any_number_of_threads(
    slots: int, opened: Opener, local: Checkpoint, tmp_path: Path
) -> None:
    """Readers that jump between all shards get the right bytes, and the disk bound holds, at whatever cost."""
    source = opened(slots)
    limit = sum(sorted((source._repository.file(s).size for s in SHARDS), reverse=True)[:slots])
    assert source.disk_bytes() == limit
    order = names(source)
    np.random.default_rng(0).shuffle(order)
    order = order[:24]
    source.schedule(order)
    most, faults = [0], []

    def work(part: list[str]) -> None:
        try:
            for name in part:
                assert np.array_equal(source.weight(name), local.weight(name))
                most[0] = max(most[0], stored(tmp_path / "scratch"))
                source.release(name)
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=work, args=(order[i::4],)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults
    assert 0 < most[0] <= limit


def test_disk_high_water_mark(server: HubServer, opened: Opener, local: Checkpoint, tmp_path: Path) -> None:
    """Sampled whenever the server is asked for something: scratch and cache together, against 2 shards + 64 MiB."""
    largest = max((local.path / s).stat().st_size for s in SHARDS)
    marks: list[int] = []
    call = lambda: marks.append(stored(tmp_path / "scratch") + stored(tmp_path / "cache"))  # noqa: E731
    server.faults.append(Fault("hook", "storage", 10**6, call=call))
    source = opened(2)
    read_all(source, local, names(source))
    assert len(marks) >= 2 * len(SHARDS)
    assert 0 < max(marks) <= 2 * largest + (64 << 20)


def test_prefetches_the_next_shard_while_one_is_used(
    opened: Opener, server: HubServer, local: Checkpoint
) -> None:
    source = opened(2)
    asked = threading.Event()
    server.faults.append(Fault("hook", "/storage/" + REPO + "/" + MAIN + "/" + SHARDS[1], call=asked.set))
    order = sorted(names(source), key=lambda n: source.tensors[n].shard)
    source.schedule(order)
    source.weight(order[0])
    assert asked.wait(10), (
        "the second shard is asked for while the first still has all of its weights to give"
    )
    assert server.sent(SHARDS[2]) == 1, "the third is not: only its header was read"


def test_reads_without_a_schedule(opened: Opener, local: Checkpoint) -> None:
    source = opened(1)
    for name in names(source)[::40]:
        assert np.array_equal(source.weight(name), local.weight(name))


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


def test_what_a_killed_run_left_is_resumed_or_removed(
    opened: Opener, server: HubServer, local: Checkpoint, tmp_path: Path
) -> None:
    left = tmp_path / "scratch" / f".mq-quant-{MAIN[:12]}-0"
    left.mkdir(parents=True)
    whole = (local.path / SHARDS[0]).read_bytes()
    (left / f"{SHARDS[0]}.part").write_bytes(whole[:7000])
    (left / SHARDS[1]).write_bytes((local.path / SHARDS[1]).read_bytes())
    (left / SHARDS[3]).write_bytes(b"stale")
    source = opened()
    assert source.scratch == left
    source.schedule(sorted(names(source), key=lambda n: source.tensors[n].shard))
    assert not (left / SHARDS[3]).exists()
    before = {s: server.sent(s) for s in SHARDS}
    for name in names(source):
        if source.tensors[name].shard in SHARDS[:2]:
            assert np.array_equal(source.weight(name), local.weight(name))
    assert server.sent(SHARDS[0]) == before[SHARDS[0]] + 1
    assert f"bytes=7000-{len(whole) - 1}" in [r.range for r in server.requests]
    assert server.sent(SHARDS[1]) == before[SHARDS[1]], "a whole verified shard is not fetched again"


def test_two_runs_do_not_share_a_scratch_folder(opened: Opener) -> None:
    assert opened().scratch != opened().scratch


def test_shards_of_the_cache_are_used_and_kept(opened: Opener, server: HubServer, local: Checkpoint) -> None:
    hub = Hub(server.endpoint, pause=0.001)
    kept = [fetch_file(REPO, s, hub=hub) for s in SHARDS[:2]]
    kept[1].resolve().write_bytes(b"broken in the cache")
    source = opened()
    before = {s: server.sent(s) for s in SHARDS}
    read_all(source, local, sorted(names(source), key=lambda n: source.tensors[n].shard))
    assert [server.sent(s) - before[s] for s in SHARDS] == [0, 1, 1, 1]
    assert kept[0].read_bytes() == (local.path / SHARDS[0]).read_bytes()


def test_revision_is_resolved_once(opened: Opener, server: HubServer, local: Checkpoint) -> None:
    """A push to the repository while a build runs changes nothing for it."""
    source = opened()
    other = hub_server.repository(local.path) | {"config.json": b"{}"}
    server.repositories[REPO] = {"2" * 40: other, **server.repositories[REPO]}
    read_all(source, local, names(source)[-20:])
    assert source.origin["revision"] == MAIN
    assert sum(r.path.startswith("/api/") for r in server.requests) == 1


def test_revision_that_vanished(opened: Opener, server: HubServer) -> None:
    source = opened()
    server.repositories[REPO] = {"2" * 40: {}}
    with pytest.raises(HubError, match="no such revision"):
        source.weight(names(source)[0])


def test_asks_for_the_revision_it_was_given(opened: Opener, server: HubServer) -> None:
    server.repositories[REPO] = {"2" * 40: {}, **server.repositories[REPO]}
    assert opened(revision=MAIN).origin["revision"] == MAIN
    with pytest.raises(HubError, match="no such revision"):
        opened(revision="3" * 40)


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


def test_offline_uses_the_cached_snapshot(
    server: HubServer, local: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(server.endpoint, pause=0.001)
    for file in local.path.iterdir():
        fetch_file(REPO, file.name, "main", hub=hub)
    snapshot = fetch_side_files(REPO, hub=hub)
    (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
    (snapshot.parents[1] / "refs" / "main").write_text(MAIN)
    before = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = open_hub(REPO)
    source.validate()
    assert source.origin == {"repository": REPO, "revision": MAIN}
    assert source.fingerprint() == local.fingerprint()
    assert fetch_side_files(REPO) == snapshot
    assert fetch_file(REPO, INDEX).read_bytes() == (local.path / INDEX).read_bytes()
    with pytest.raises(HubError, match="not in the cache"):
        fetch_file(REPO, "../../../etc/passwd")
    with pytest.raises(HubError, match="not in the cache"):
        open_hub("acme/other")
    assert len(server.requests) == before


def test_single_files(server: HubServer, tmp_path: Path) -> None:
    server.repositories["acme/imatrix"] = {MAIN: {"imatrix.gguf_file": b"GGUF" * 100}}
    hub = Hub(server.endpoint, pause=0.001)
    path = fetch_file("acme/imatrix", "imatrix.gguf_file", hub=hub)
    assert path.read_bytes() == b"GGUF" * 100
    assert MAIN in path.parts
    folder = fetch_side_files(REPO, hub=hub)
    assert {p.name for p in folder.iterdir()} == {"config.json", "tokenizer.json"}
    path.resolve().write_bytes(b"GGUF" * 99 + b"oops")
    assert fetch_file("acme/imatrix", "imatrix.gguf_file", hub=hub).read_bytes() == b"GGUF" * 100
    path.resolve().write_bytes(b"GGUF" * 99 + b"oops")
    server.faults.append(Fault("flip", "imatrix.gguf_file", 99, 7))
    with pytest.raises(HubError, match="its hash differs"):
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
    with pytest.raises(HubError, match=r"does not speak|states no"):
        open_hub(REPO, hub=Hub(server.endpoint, pause=0.001), scratch=tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


REFUSED: dict[str, tuple[str, bytes | None, type[Exception], str]] = {
    "no config": ("config.json", None, HubError, "no such file"),
    "other model": ("config.json", b'{"model_type":"llama"}', ConfigError, "llama"),
    "no index": (INDEX, None, HubError, "no such file"),
    "traversal": (INDEX, b'{"weight_map":{"a":"../x.safetensors"}}', CheckpointError, "plain .safetensors"),
    "missing shard": (SHARDS[1], None, HubError, f"{SHARDS[1]}: revision .* has no such file"),
    "truncated shard": (
        SHARDS[1],
        struct.pack("<Q", 5000) + b"{}",
        CheckpointError,
        "ends inside its header",
    ),
    "absurd header": (SHARDS[1], b"\xff" * 100, CheckpointError, "header length"),
    "empty shard": (SHARDS[1], b"", CheckpointError, "header length is missing"),
    "hostile header": (SHARDS[1], struct.pack("<Q", 6) + b"[[[[[[", CheckpointError, "safetensors header"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_opening(case: str, opened: Opener, server: HubServer) -> None:
    name, data, error, text = REFUSED[case]
    files = server.repositories[REPO][MAIN]
    server.repositories[REPO][MAIN] = {n: d for n, d in (files | {name: data}).items() if d is not None}
    with pytest.raises(error, match=text):
        opened()


def test_long_headers_take_a_second_read(
    opened: Opener, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq_quant.formats.hub.HEADER_GUESS", 64)
    opened().validate()
    assert server.sent(SHARDS[0]) == 2


def test_no_such_repository(server: HubServer, tmp_path: Path) -> None:
    for name, text in (("acme/nothing", "no such repository"), ("a/b/c", "owner/name"), ("..", "owner/name")):
        with pytest.raises(HubError, match=text):
            open_hub(name, hub=Hub(server.endpoint, pause=0.001), scratch=tmp_path)
    with pytest.raises(HubError, match="cannot hold any"):
        open_hub(REPO, shard_cache=0)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"connection failed.*7 attempts"):
        open_hub(REPO, hub=Hub(NOWHERE, pause=0.001), scratch=tmp_path)


def test_full_disk(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hubclient.Remote, "digest", full)
    with pytest.raises(HubError, match="the disk is full"):
        source.weight("model.norm.weight")


def test_small_files_are_verified_by_their_git_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"what is up, doc?")
    git = "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert Hub().verify(Remote("x", 16, None, git), tmp_path / "x")
    assert not Hub().verify(Remote("x", 16, None, "0" * 40), tmp_path / "x")
    sha256 = hashlib.sha256(b"what is up, doc?").hexdigest()
    assert Hub().verify(Remote("x", 16, sha256, "0" * 40), tmp_path / "x")


def test_trained_checkpoint_streams(tmp_path: Path) -> None:
    root = os.environ.get("MQ_QUANT_MODELS")
    if not root:
        pytest.skip("MQ_QUANT_MODELS is not set")
    local = open_checkpoint(Path(root) / "trained-tiny")
    files = {n: d for n, d in hub_server.repository(local.path).items() if not n.endswith(".npy")}
    with hub_server.serve({REPO: {MAIN: files}}) as server:
        source = open_hub(REPO, hub=Hub(server.endpoint), scratch=tmp_path)
        source.validate()
        assert json.loads(json.dumps(source.fingerprint())) == local.fingerprint()
        order = names(source)[::13]
        read_all(source, local, order)
        source.close()
