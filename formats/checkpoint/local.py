"""A checkpoint in a local folder: `model.safetensors`, or shards and their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, MqError, WeightError
from ..text import printable
from ..tokenizer.vocabulary import check_tokenizer
from ..unchanged import KnownHash, UnchangedFile
from ..watch import UNWATCHED, Watch
from .documents import check_index, config_notes, load_config, load_index
from .holes import hollow
from .inventory import check_inventory, left_out
from .names import CONFIG, INDEX, SIDE_FILES, SINGLE, TOKENIZER
from .safetensors_file import TensorInfo, by_name, header_of, payload_of, some
from .source import F32, U8
from .stated_hash import check_stated_hash
from .weights import TensorReader

HASHERS = 4
"""Files hashed at a time: a full checkpoint is read at the speed of the disk."""


class Checkpoint:
    """A checkpoint in a folder, which nobody may change while it is open. Safe for several threads.

    Opening reads config.json and all shard headers and raises ConfigError or CheckpointError. Where an index and a
    `model.safetensors` lie side by side, the index decides, and `notes` says so.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                "is not a folder", file=path, hint="--source takes a checkpoint folder or a hub repository"
            )
        self._files: dict[str, UnchangedFile] = {}
        self._believed: dict[str, KnownHash] = {}
        self.raw_config, self.config = load_config(self._file(CONFIG, ConfigError))
        weight_map = self._weight_map()
        self.shards: tuple[str, ...] = tuple(sorted(set(weight_map.values()))) or (SINGLE,)
        self._refuse_missing()
        self.tensors: Mapping[str, TensorInfo] = by_name(map(self._header, self.shards), self.path)
        if weight_map:
            check_index(weight_map, self.tensors, self._file(INDEX))
        self._left_out = left_out(self.tensors, self.config, self.raw_config)
        self.skipped_mtp = self._left_out.mtp
        stray = SINGLE not in self.shards and (self.path / SINGLE).is_file()
        strays = (f"{self.path / SINGLE} is not read: {INDEX} names other shards",) if stray else ()
        self.notes = (*config_notes(self.raw_config, self.path / CONFIG), *strays, *self._left_out.notes())
        self._reader = TensorReader(self.tensors, self.config, self._read, self.path)

    @property
    def origin(self) -> dict[str, str]:
        return {"folder": printable(self.path.resolve().name)}  # it goes into JSON, which holds text only

    def validate(self) -> None:
        """As `Source.validate`; a tensor that lies in a hole of its shard is refused too."""
        check_inventory(self.tensors, self.config, self._left_out, self.path)
        check_tokenizer(self.side_file(TOKENIZER), self.config.vocab_size)
        for shard in self.shards:
            self._refuse_holes(shard)

    def side_file(self, name: str) -> Path | None:
        """The path of one of SIDE_FILES, or None where the folder has none."""
        if name not in SIDE_FILES:
            raise ValueError(f"{name!r} is not a side file of a checkpoint")
        return self._file(name).path if (self.path / name).is_file() else None

    def schedule(self, names: Sequence[str]) -> None:
        """Nothing to prepare: local tensors can be read in any order."""

    def weight(self, name: str) -> F32:
        """As `Source.weight`."""
        return self._reader.weight(name)

    def rows(self, name: str, low: int, high: int) -> F32:
        """As `Source.rows`."""
        return self._reader.rows(name, low, high)

    def stored(self, name: str) -> tuple[U8, F32]:
        """As `Source.stored`."""
        return self._reader.stored(name)

    def release(self, name: str) -> None:
        """Nothing to give back: no tensor is kept."""

    def fingerprint(self, watch: Watch = UNWATCHED) -> dict[str, dict[str, Any]]:
        """{file name: {bytes, sha256}} of config, side files and shards; reads every byte of them.

        Raises CheckpointError where a file is not what huggingface_hub states that it fetched.
        """
        sides = [n for n in SIDE_FILES if (self.path / n).is_file()]
        files = {name: self._file(name) for name in (CONFIG, *sides, *self.shards)}
        watch.begin("hashing the source", sum(file.size for file in files.values()), "bytes")
        believed = {name: known.as_record() for name, known in self._believed.items()}
        rest = {name: file for name, file in files.items() if name not in believed}
        with ThreadPoolExecutor(HASHERS) as pool:
            hashed = dict(zip(rest, pool.map(partial(_record, watch=watch), rest.values()), strict=True))
        return {name: {**hashed, **believed}[name] for name in files}

    def known_hashes(self) -> dict[str, KnownHash]:
        """The hashes of the shards, for another process that opens this checkpoint or a copy of it."""
        return {name: self._file(name).known() for name in self.shards}

    def shard_bytes(self) -> dict[str, int]:
        """The size of each shard."""
        return {name: self._file(name).size for name in self.shards}

    def trust(self, shard: str, known: KnownHash) -> bool:
        """Take over the hash of a shard that another machine has computed; False where it saw another file."""
        return self._file(shard).trust(known)

    def believe(self, hashes: Mapping[str, KnownHash]) -> None:
        """Take over hashes of shards: `fingerprint` gives them, and a shard that is not the same file is held against
        its hash before it is used.
        """
        self._believed = {name: known for name, known in hashes.items() if name in self.shards}
        for name, known in self._believed.items():
            self._file(name).believe(known)

    def disk_bytes(self) -> int:
        """Nothing is fetched."""
        return 0

    def close(self) -> None:
        """Nothing is held open."""

    def _file(self, name: str, error: type[MqError] = CheckpointError) -> UnchangedFile:
        """One file of the folder, whose state is noted when it is first asked for."""
        if name not in self._files:
            hint = "is this the folder of a checkpoint?"
            self._files[name] = UnchangedFile(self.path / name, error, hint)
        return self._files[name]

    def _weight_map(self) -> dict[str, str]:
        """{tensor name: shard} of the index, empty where there is none and a single file holds all."""
        if (self.path / INDEX).is_file():
            return load_index(self._file(INDEX))
        if (self.path / SINGLE).is_file():
            return {}
        others = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        if others:
            raise CheckpointError(
                f"holds its weights in another form: {some(others, 3)}",
                file=self.path,
                hint=f"mq-quant reads {SINGLE}, or shards and {INDEX}",
            )
        return load_index(self._file(INDEX))

    def _refuse_missing(self) -> None:
        missing = [s for s in self.shards if not (self.path / s).is_file()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(self.shards)} shards are missing: {some(missing)}",
                file=self.path,
                hint="fetch the missing shards",
            )

    def _refuse_holes(self, shard: str) -> None:
        file, unused = self._file(shard), self._left_out.names
        used = [t for t in self.tensors.values() if t.shard == shard and t.name not in unused]
        info = file.read(lambda f: hollow(f, used))
        if info is not None:
            raise WeightError(
                "all of its bytes are zero, for nothing was written there (the file has a hole)",
                file=file.path,
                tensor=info.name,
                hint="the download was stopped; fetch the shard again",
            )

    def _header(self, shard: str) -> list[TensorInfo]:
        file = self._file(shard)
        return file.read(lambda f: header_of(f, file.path))

    def _read(self, info: TensorInfo) -> U8:
        file = self._file(info.shard)
        return file.read(lambda f: payload_of(f, info, file.path))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder; raises ConfigError or CheckpointError."""
    return Checkpoint(path)


def _record(file: UnchangedFile, watch: Watch) -> dict[str, Any]:
    record = file.record(watch)
    check_stated_hash(file)
    return record
