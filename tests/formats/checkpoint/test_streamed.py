"""Checkpoints streamed from a hub on loopback: the same weights, each shard once, and what stays on the disk."""

import json
import os
import struct
import threading
from pathlib import Path

import hub_server
import numpy as np
import pytest
from hub_fixtures import INDEX, SHARDS, Opener, names, read_all, stored
from hub_server import MAIN, REPO, Fault, HubServer
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.checkpoint.streamed import open_hub
from mq_quant.formats.errors import CheckpointError, ConfigError, HubError
from mq_quant.formats.hub.client import Hub
from mq_quant.formats.hub.files import fetch_file, fetch_files, snapshot

pytestmark = pytest.mark.usefixtures("isolated")


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
    assert tokenizer is not None and tokenizer.read_bytes() == (local.path / "tokenizer.json").read_bytes()
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


def test_asks_for_the_revision_it_was_given(opened: Opener, server: HubServer) -> None:
    server.repositories[REPO] = {"2" * 40: {}, **server.repositories[REPO]}
    assert opened(revision=MAIN).origin["revision"] == MAIN
    with pytest.raises(HubError, match="no such revision"):
        opened(revision="3" * 40)


def test_offline_uses_the_cached_snapshot(
    server: HubServer, local: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(server.endpoint, pause=0.001)
    for file in local.path.iterdir():
        fetch_file(REPO, file.name, "main", hub=hub)
    folder = fetch_file(REPO, "config.json", hub=hub).parent
    (folder.parents[1] / "refs").mkdir(exist_ok=True)
    (folder.parents[1] / "refs" / "main").write_text(MAIN)
    before = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = open_hub(REPO)
    source.validate()
    assert source.origin == {"repository": REPO, "revision": MAIN}
    assert source.fingerprint() == local.fingerprint()
    assert snapshot(REPO, None) == folder
    assert fetch_files(REPO, ("config.json", "absent")) == {"config.json": folder / "config.json"}
    assert fetch_file(REPO, INDEX).read_bytes() == (local.path / INDEX).read_bytes()
    with pytest.raises(HubError, match="not in the cache"):
        fetch_file(REPO, "../../../etc/passwd")
    with pytest.raises(HubError, match="not in the cache"):
        open_hub("acme/other")
    assert len(server.requests) == before


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
    monkeypatch.setattr("mq_quant.formats.checkpoint.streamed.HEADER_GUESS", 64)
    opened().validate()
    assert server.sent(SHARDS[0]) == 2


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
