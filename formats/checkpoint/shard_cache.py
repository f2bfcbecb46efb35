"""A bounded set of shards on the disk: fetched in the order of need, the next one early, deleted after the last use.

At most `slots` shards are on the disk or on their way to it. Where a shard is asked for out of order, the shard whose
next use lies farthest ahead is deleted to make room. The cache knows nothing of the hub: `fetch` brings a shard.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import HubError
from ..hub.transfer import PART

Fetch = Callable[[str, Path], Path]
"""Brings a shard, and returns its path: the given one, or that of a file elsewhere, which the cache never deletes."""


class ShardCache:
    """Shards by name in `folder`, for any number of readers and one thread that fetches."""

    def __init__(self, folder: Path, fetch: Fetch, slots: int) -> None:
        self._folder, self._fetch, self._slots = folder, fetch, slots
        self._changed = threading.Condition()
        self._uses: dict[str, set[int]] = {}
        self._present: dict[str, Path] = {}
        self._readers: Counter[str] = Counter()
        self._faults: dict[str, BaseException] = {}
        self._loading: str | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def schedule(self, uses: Sequence[tuple[str, ...]]) -> None:
        """Set the order of need: use number i needs the shards uses[i]. The earlier order is forgotten.

        Shards of an earlier run are kept if they are among the first `slots` of this order, else deleted.
        """
        with self._changed:
            self._uses, self._faults = {}, {}
            for i, shards in enumerate(uses):
                for shard in shards:
                    self._uses.setdefault(shard, set()).add(i)
            known = {*self._present, self._loading, *list(self._uses)[: self._slots]}
            for left in self._folder.glob("*.safetensors*"):
                if left.name.removesuffix(PART) not in known:
                    with contextlib.suppress(OSError):
                        left.unlink()
            self._remove_unused()
            self._start()

    def finish(self, use: int, shards: tuple[str, ...]) -> None:
        """Tell that use number `use` is over: those of its shards that no later use needs are deleted."""
        with self._changed:
            for shard in shards:
                self._uses.get(shard, set()).discard(use)
            self._remove_unused()

    @contextmanager
    def hold(self, shard: str) -> Iterator[Path]:
        """Wait until a shard is on the disk, and keep it there while the block lasts; raises what `fetch` raised."""
        with self._changed:
            self._readers[shard] += 1
            if self._readers[shard] == 1:
                self._faults.pop(shard, None)
            self._start()
            try:
                while shard not in self._present:
                    if self._closed:
                        raise HubError("the source is closed", file=shard)
                    if shard in self._faults:
                        raise self._faults[shard]
                    self._changed.wait()
                path = self._present[shard]
            except BaseException:
                self._let_go(shard)
                raise
        try:
            yield path
        finally:
            with self._changed:
                self._let_go(shard)

    def close(self) -> None:
        """Wait for the shard that is being fetched, fetch no other, and delete the shards in the folder."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            for shard in list(self._present):
                self._delete(shard)

    def _let_go(self, shard: str) -> None:
        self._readers[shard] -= 1
        if not self._readers[shard]:
            del self._readers[shard]
        self._remove_unused()

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _remove_unused(self) -> None:
        """Delete shards whose uses are over. A shard that no order names stays until its slot is needed."""
        for shard in [s for s in self._present if not self._readers[s] and self._uses.get(s) == set()]:
            self._delete(shard)
        self._changed.notify_all()

    def _delete(self, shard: str) -> None:
        if self._present.pop(shard).parent == self._folder:
            with contextlib.suppress(OSError):
                (self._folder / shard).unlink()

    def _next_use(self, shard: str) -> float:
        return min(self._uses.get(shard) or (math.inf,))

    def _pick(self) -> str | None:
        """The shard to fetch now, after room was made for it; None where no shard is to be fetched yet."""
        wanted = [s for s in self._readers if s not in self._present and s not in self._faults]
        if wanted:
            if len(self._present) >= self._slots:
                idle = [s for s in self._present if not self._readers[s]]
                if not idle:
                    return None
                self._delete(max(idle, key=self._next_use))
            return min(wanted, key=self._next_use)
        if len(self._present) >= self._slots:
            return None
        coming = [s for s, u in self._uses.items() if u and s not in self._present and s not in self._faults]
        return min(coming, key=self._next_use, default=None)

    def _next(self) -> str | None:
        """Wait, with the lock held, for a shard that is to be fetched; None once the cache is closed."""
        while not self._closed:
            if (shard := self._pick()) is not None:
                return shard
            self._changed.wait()
        return None

    def _run(self) -> None:
        while True:
            with self._changed:
                shard = self._next()
                if shard is None:
                    return
                self._loading = shard
            try:
                path, fault = self._fetch(shard, self._folder / shard), None
            except BaseException as e:  # handed to whoever waits for this shard
                path, fault = self._folder / shard, e
            with self._changed:
                self._loading = None
                if fault is None:
                    self._present[shard] = path
                else:
                    self._faults[shard] = fault
                self._remove_unused()
