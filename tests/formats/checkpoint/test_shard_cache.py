"""The bounded shard cache, driven without a network: the fetcher is a function that the test steers."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.checkpoint.shard_cache import ShardCache
from mq_quant.formats.errors import HubError

Start = Callable[..., ShardCache]


class Recorder:
    """Writes each shard's own name as its content, and watches how many files lie in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.most = 0
        self.broken: set[str] = set()
        self.gates: dict[str, threading.Event] = {}

    def __call__(self, shard: str, target: Path) -> Path:
        self.fetched.append(shard)
        if shard in self.gates:
            assert self.gates[shard].wait(10)
        if shard in self.broken:
            raise HubError("broken", file=shard)
        target.write_text(shard)
        self.most = max(self.most, len(list(self.folder.iterdir())))
        return target


@pytest.fixture
def fetch(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


@pytest.fixture
def start(fetch: Recorder) -> Iterator[Start]:
    caches: list[ShardCache] = []

    def make(slots: int) -> ShardCache:
        caches.append(ShardCache(fetch.folder, fetch, slots))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
    assert not list(fetch.folder.iterdir())


def read(cache: ShardCache, shard: str) -> str:
    with cache.hold(shard) as path:
        return path.read_text()


def test_in_order_each_is_fetched_once(start: Start, fetch: Recorder) -> None:
    cache = start(2)
    uses = [("a",), ("a", "b"), ("b",), ("c",), ("d",)]
    cache.schedule(uses)
    for i, shards in enumerate(uses):
        assert [read(cache, s) for s in shards] == list(shards)
        cache.finish(i, shards)
    assert fetch.fetched == ["a", "b", "c", "d"]
    assert fetch.most <= 2
    assert not list(fetch.folder.iterdir())


def test_farthest_use_makes_room(start: Start, fetch: Recorder) -> None:
    cache = start(2)
    cache.schedule([("a",), ("b",), ("c",), ("b",), ("a",)])
    assert read(cache, "a") == "a"
    cache.finish(0, ("a",))
    assert read(cache, "b") == "b"
    assert read(cache, "c") == "c", "a gives way, whose next use is the last of all"
    assert read(cache, "b") == "b"
    assert fetch.fetched == ["a", "b", "c"]
    assert read(cache, "a") == "a"
    assert fetch.most <= 2


def test_a_second_schedule_keeps_what_is_there(start: Start, fetch: Recorder) -> None:
    cache = start(2)
    uses = [("a",), ("b",)]
    cache.schedule(uses)
    assert [read(cache, s) for s in "ab"] == ["a", "b"]
    cache.schedule([("b",), ("a",)])
    assert [read(cache, s) for s in "ba"] == ["b", "a"]
    cache.schedule([("c",)])
    assert [read(cache, s) for s in "abc"] == ["a", "b", "c"]
    assert fetch.most <= 2


def test_what_an_earlier_run_left(fetch: Recorder, start: Start) -> None:
    for name in ("1.safetensors", "2.safetensors.part", "3.safetensors", "4.safetensors.part"):
        (fetch.folder / name).write_text("left")
    cache = start(2)
    fetch.gates["1.safetensors"] = threading.Event()
    cache.schedule([("1.safetensors",), ("2.safetensors",), ("3.safetensors",)])
    assert sorted(p.name for p in fetch.folder.iterdir()) == ["1.safetensors", "2.safetensors.part"]
    (fetch.folder / "2.safetensors.part").unlink()
    fetch.gates["1.safetensors"].set()
    assert read(cache, "1.safetensors") == "1.safetensors"


def test_held_shards_are_not_evicted(start: Start, fetch: Recorder) -> None:
    cache = start(2)
    with cache.hold("a") as a, cache.hold("b") as b:
        waiter = threading.Thread(target=read, args=(cache, "c"))
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive(), "no slot is free, so the third reader waits"
        assert (a.read_text(), b.read_text()) == ("a", "b")
    waiter.join(10)
    assert not waiter.is_alive()
    assert fetch.most <= 2


def test_fault_reaches_all_who_wait_and_is_then_forgotten(start: Start, fetch: Recorder) -> None:
    cache = start(1)
    fetch.broken.add("a")
    fetch.gates["a"] = threading.Event()
    faults: list[BaseException] = []

    def work() -> None:
        try:
            read(cache, "a")
        except HubError as e:
            faults.append(e)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    fetch.gates["a"].set()
    for t in threads:
        t.join(10)
    assert len(faults) == 3
    fetch.broken.clear()
    assert read(cache, "a") == "a"


def test_failed_prefetch_does_not_disturb_the_others(start: Start, fetch: Recorder) -> None:
    cache = start(2)
    fetch.broken.add("b")
    cache.schedule([("a",), ("b",), ("c",)])
    assert read(cache, "a") == "a"
    assert read(cache, "c") == "c"
    with pytest.raises(HubError, match="broken"):
        read(cache, "b")


def test_files_elsewhere_are_never_deleted(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    folder = tmp_path / "ours"
    folder.mkdir()
    cache = ShardCache(folder, lambda shard, target: theirs, 1)
    cache.schedule([("a",)])
    assert read(cache, "a") == "kept"
    cache.finish(0, ("a",))
    cache.close()
    assert theirs.read_text() == "kept"


def test_closing_ends_waits(start: Start, fetch: Recorder) -> None:
    cache = start(1)
    fetch.gates["a"] = threading.Event()
    faults: list[BaseException] = []

    def work() -> None:
        try:
            read(cache, "a")
        except HubError as e:
            faults.append(e)

    reader = threading.Thread(target=work)
    reader.start()
    closer = threading.Thread(target=cache.close)
    closer.start()
    reader.join(10)
    assert not reader.is_alive()
    fetch.gates["a"].set()
    closer.join(10)
    assert [str(e) for e in faults] == ["a: the source is closed"]
    with pytest.raises(HubError, match="closed"):
        read(cache, "b")


@given(
    st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=2, unique=True), max_size=12),
    st.integers(1, 3),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_any_schedule_any_order_any_threads(
    tmp_path_factory: pytest.TempPathFactory, uses: list[list[str]], slots: int, workers: int, random: object
) -> None:
    """Whatever the order of asking, all get their shard, the bound holds, and nothing stays behind."""
    fetch = Recorder(tmp_path_factory.mktemp("cache"))
    cache = ShardCache(fetch.folder, fetch, slots)
    order = list(range(len(uses)))
    random.shuffle(order)  # type: ignore[attr-defined]
    cache.schedule([tuple(u) for u in uses])
    wrong: list[object] = []

    def work(part: list[int]) -> None:
        try:
            for i in part:
                wrong.extend(s for s in uses[i] if read(cache, s) != s)
                cache.finish(i, tuple(uses[i]))
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(order[i::workers],)) for i in range(workers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert not any(t.is_alive() for t in threads)
    assert not wrong
    assert fetch.most <= slots
    cache.close()
    assert not list(fetch.folder.iterdir())
