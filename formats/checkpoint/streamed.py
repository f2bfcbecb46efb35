"""A checkpoint streamed from the hub: headers first, then shard after shard, each verified, used and deleted.

`HubCheckpoint` offers what a local Checkpoint does. The revision is resolved once, the inventory is checked from
ranged reads of the headers alone, and the disk holds at most `shard_cache` shards. In offline mode the copy in
huggingface_hub's cache is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, HubError
from ..hub.cache import cached, fetched, snapshot_of
from ..hub.client import Hub
from ..hub.files import snapshot
from ..hub.repository import Repository
from ..hub.settings import offline
from ..tokenizer.vocabulary import check_tokenizer
from ..unchanged import UnchangedFile
from ..watch import UNWATCHED, Watch
from .documents import check_index, config_notes, load_config, load_index
from .inventory import check_inventory, left_out
from .local import Checkpoint, open_checkpoint
from .names import CONFIG, INDEX, SIDE_FILES, SINGLE, TOKENIZER
from .safetensors_file import TensorInfo, by_name, header_length, header_of, parse_header, payload_of
from .scratch import Scratch
from .shard_cache import ShardCache
from .source import F32, JSON_LIMIT, U8, Source
from .weights import TensorReader, scale_of

HEADER_GUESS = 128 << 10
CONNECTIONS = 8


class HubCheckpoint:
    """A checkpoint on the hub at one commit. Safe for several threads; close it to stop fetching and free the disk.

    Opening reads config.json, the index and all shard headers, and raises HubError, ConfigError or CheckpointError.
    """

    def __init__(self, hub: Hub, repository: Repository, shard_cache: int, scratch: Path) -> None:
        self._hub, self._repository = hub, repository
        self.path = f"{repository.name}@{repository.commit[:12]}"
        self._small: dict[str, UnchangedFile] = {}
        self.raw_config, self.config = load_config(self._fetch_small(CONFIG))
        indexed = INDEX in repository.files or SINGLE not in repository.files
        weight_map = load_index(self._fetch_small(INDEX)) if indexed else dict[str, str]()
        self.shards: tuple[str, ...] = tuple(sorted(set(weight_map.values()))) or (SINGLE,)
        for shard in self.shards:
            if repository.file(shard).sha256 is None:
                raise HubError("the hub states no sha256 for this shard", file=f"{self.path}/{shard}")
        self._headers = self._read_headers()
        self.tensors: Mapping[str, TensorInfo] = by_name(self._headers.values(), self.path)
        if weight_map:
            check_index(weight_map, self.tensors, self._small[INDEX])
        self._left_out = left_out(self.tensors, self.config, self.raw_config)
        self.skipped_mtp = self._left_out.mtp
        stray = SINGLE in repository.files and SINGLE not in self.shards
        strays = (f"{self.path}/{SINGLE} is not read: {INDEX} names other shards",) if stray else ()
        self.notes = (
            *config_notes(self.raw_config, f"{self.path}/{CONFIG}"),
            *strays,
            *self._left_out.notes(),
        )
        self._reader = TensorReader(self.tensors, self.config, self._read, self.path)
        self._slots = shard_cache
        self._uses: dict[str, int] = {}
        self._files: dict[str, UnchangedFile] = {}
        self._scratch = Scratch(scratch, repository.commit)
        self._cache = ShardCache(self._scratch.path, self._fetch_shard, shard_cache)

    @property
    def origin(self) -> dict[str, str]:
        return {"repository": self._repository.name, "revision": self._repository.commit}

    @property
    def scratch(self) -> Path:
        """The folder of the shards that were fetched."""
        return self._scratch.path

    def validate(self) -> None:
        """As `Source.validate`; no shard is fetched."""
        check_inventory(self.tensors, self.config, self._left_out, self.path)
        check_tokenizer(self.side_file(TOKENIZER), self.config.vocab_size)

    def side_file(self, name: str) -> Path | None:
        """The path of one of SIDE_FILES, fetched to huggingface_hub's cache, or None where there is none."""
        if name not in SIDE_FILES:
            raise ValueError(f"{name!r} is not a side file of a checkpoint")
        return self._fetch_small(name).path if name in self._repository.files else None

    def schedule(self, names: Sequence[str]) -> None:
        """Begin to fetch shards, in the order in which these weights need them. The earlier order is forgotten."""
        self._uses = {name: i for i, name in enumerate(names)}
        self._cache.schedule([self._shards_of(name) for name in names])

    def weight(self, name: str) -> F32:
        """As `Source.weight`, once the shard is here; HubError where it does not come."""
        return self._reader.weight(name)

    def rows(self, name: str, low: int, high: int) -> F32:
        """As `Source.rows`, once the shard is here."""
        return self._reader.rows(name, low, high)

    def stored(self, name: str) -> tuple[U8, F32]:
        """As `Source.stored`, once the shard is here."""
        return self._reader.stored(name)

    def release(self, name: str) -> None:
        """Tell that a scheduled weight is not needed again: a shard of which no weight is needed is deleted."""
        if name in self._uses:
            self._cache.finish(self._uses[name], self._shards_of(name))

    def fingerprint(self, watch: Watch = UNWATCHED) -> dict[str, dict[str, Any]]:
        """As of a local checkpoint with the same files. The shards' hashes are the hub's, and hold for what arrives."""
        sides = [n for n in SIDE_FILES if n in self._repository.files]
        records = {n: self._fetch_small(n).record() for n in (CONFIG, *sides)}
        remotes = [self._repository.file(s) for s in self.shards]
        return records | {r.name: {"bytes": r.size, "sha256": r.sha256} for r in remotes}

    def disk_bytes(self) -> int:
        """The most bytes that fetched shards take on the disk at any time."""
        sizes = sorted((self._repository.file(s).size for s in self.shards), reverse=True)
        return sum(sizes[: self._slots])

    def close(self) -> None:
        """Stop the download under way and remove the scratch folder."""
        self._hub.stop.set()
        self._cache.close()
        self._scratch.close()

    def _shards_of(self, name: str) -> tuple[str, ...]:
        infos = (self.tensors.get(name), scale_of(name, self.tensors))
        return tuple(dict.fromkeys(info.shard for info in infos if info is not None))

    def _fetch_small(self, name: str) -> UnchangedFile:
        if name not in self._small:
            remote = self._repository.file(name)
            if remote.size > JSON_LIMIT:
                raise HubError(f"has {remote.size} bytes, more than {JSON_LIMIT}", file=f"{self.path}/{name}")
            self._small[name] = UnchangedFile(fetched(self._hub, self._repository, remote), CheckpointError)
        return self._small[name]

    def _read_headers(self) -> dict[str, list[TensorInfo]]:
        """The headers of all shards, several at a time; the first error ends the others that have not begun."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                return dict(zip(self.shards, pool.map(self._read_header, self.shards), strict=True))
            except (KeyboardInterrupt, SystemExit):
                self._hub.stop.set()
                raise

    def _read_header(self, shard: str) -> list[TensorInfo]:
        remote, where = self._repository.file(shard), f"{self.path}/{shard}"
        head = self._hub.read(self._repository, remote, 0, min(HEADER_GUESS, remote.size))
        length = header_length(head, where)
        if 8 + length > remote.size:
            raise CheckpointError("ends inside its header", file=where)
        if 8 + length > len(head):
            head += self._hub.read(self._repository, remote, len(head), 8 + length)
        return parse_header(head[8 : 8 + length], shard, remote.size, where)

    def _fetch_shard(self, shard: str, target: Path) -> Path:
        remote = self._repository.file(shard)
        path = cached(self._repository, remote)
        if path is None:
            if target.is_symlink() or not remote.lies_at(target):
                target.unlink(missing_ok=True)
                self._hub.download(self._repository, remote, target)
            path = target
        file = UnchangedFile(path, CheckpointError)
        if file.read(lambda f: header_of(f, path)) != self._headers[shard]:
            raise CheckpointError("its header is not the one read before the download", file=path)
        self._files[shard] = file
        return path

    def _read(self, info: TensorInfo) -> U8:
        with self._cache.hold(info.shard) as path:
            return self._files[info.shard].read(lambda f: payload_of(f, info, path))


class CachedCheckpoint(Checkpoint):
    """A snapshot in huggingface_hub's cache: a local checkpoint that knows its repository and commit."""

    def __init__(self, path: Path, repository: str, revision: str) -> None:
        super().__init__(path)
        self._origin = {"repository": repository, "revision": revision}

    @property
    def origin(self) -> dict[str, str]:
        return self._origin


def open_folder(path: Path) -> Checkpoint:
    """A checkpoint in a folder, which may be a snapshot in huggingface_hub's cache; ConfigError or CheckpointError."""
    known = snapshot_of(path)
    return CachedCheckpoint(path, *known) if known else open_checkpoint(path)


def open_hub(
    repository: str,
    revision: str | None = None,
    shard_cache: int = 2,
    *,
    scratch: Path | None = None,
    hub: Hub | None = None,
) -> Source:
    """Open a checkpoint on the hub, streamed with at most `shard_cache` shards in `scratch` (default: this folder).

    In offline mode it is the cached snapshot. Raises HubError, ConfigError or CheckpointError.
    """
    if shard_cache < 1:
        raise HubError(f"a shard cache of {shard_cache} shards cannot hold any")
    if offline():
        return open_folder(snapshot(repository, revision))
    hub = hub or Hub()
    return HubCheckpoint(hub, hub.resolve(repository, revision), shard_cache, scratch or Path())
