"""The HFQ container: a reader that hands out payloads on demand, and a writer for whole small files.

A file is refused unless every byte up to the end of its payloads is accounted for: names are unique, sizes follow from
shapes, and nothing lies between them. Bytes after the last payload are the one thing that is let through and counted:
newer programs of the engine append metadata there, and the engine ignores them.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import HfqError, HfqKind
from ..near import near_file
from ..own_file import disk_error
from ..plain_file import hint_of, open_plain
from ..strictjson import JsonError, ObjectScanner, parse_object
from .layout import (
    COUNT_LIMIT,
    ENTRY_TAIL,
    HEADER,
    INDEX_LIMIT,
    MAGIC,
    METADATA_LIMIT,
    METADATA_OFFSET,
    SMALLEST_ENTRY,
    VERSION,
    Bytes,
    Layout,
    QuantizationHash,
    TensorEntry,
    TensorMeta,
    byte_view,
    check_index,
    layout,
    place,
)

CHUNK = 8 << 20
"""Bytes of a payload that are read at a time."""
_FORK_VERSION = 2
_DAMAGED = "the file is damaged; fetch or build it again"


class HfqFile:
    """An open HFQ file: metadata and index in memory, payloads read on demand, by any number of threads.

    Raises HfqError on opening for anything that is not a well-formed file; the limits of `layout` bound its memory.
    `metadata` is what strict JSON makes of `metadata_bytes`, and `trailing_bytes` counts what follows the last payload.
    """

    path: Path
    version: int
    arch_id: int
    metadata: dict[str, Any]
    metadata_bytes: bytes
    data_offset: int
    entries: tuple[TensorEntry, ...]
    trailing_bytes: int

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = open_plain(self.path)
        except OSError as e:
            problem, hint = f"cannot be opened: {e.strerror}", hint_of(e, near_file(self.path))
            raise HfqError(problem, kind=HfqKind.UNOPENABLE, file=path, hint=hint) from None
        try:
            self._parse()
        except HfqError as e:
            self.close()
            if e.hint is not None or e.kind in (HfqKind.NOT_HFQ, HfqKind.VERSION):
                raise
            raise HfqError(e.problem, kind=e.kind, file=e.file, tensor=e.tensor, hint=_DAMAGED) from None
        except BaseException:
            self.close()
            raise
        self._by_name = {e.name: e for e in self.entries}

    def __enter__(self) -> HfqFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def entry(self, name: str) -> TensorEntry:
        """The index line of a tensor; HfqError if there is none."""
        if name not in self._by_name:
            raise HfqError(
                "no such tensor",
                kind=HfqKind.NO_TENSOR,
                file=self.path,
                tensor=name,
                hint="list them with mq-quant inspect",
            )
        return self._by_name[name]

    def read(self, name: str) -> NDArray[np.uint8]:
        """One tensor's payload as u8 [nbytes]."""
        entry = self.entry(name)
        return self.read_range(entry, 0, entry.nbytes)

    def read_range(self, entry: TensorEntry, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes start to stop of one tensor's payload as u8 [stop - start]; ValueError outside of it."""
        if not 0 <= start <= stop <= entry.nbytes:
            raise ValueError(f"range {start}:{stop} is not inside the {entry.nbytes} bytes of {entry.name}")
        return self._read_at(entry.offset + start, stop - start, entry.name)

    def _read_at(self, start: int, size: int, tensor: str | None = None) -> NDArray[np.uint8]:
        out = np.empty(size, np.uint8)
        done = 0
        while done < out.size:
            try:
                count = os.preadv(self._file.fileno(), [out[done:].data], start + done)
            except OSError as e:
                self._refuse(HfqKind.UNREADABLE, f"reading failed: {e.strerror}", tensor, hint_of(e))
            if count == 0:
                what = "this payload" if tensor else "the bytes after its payloads"
                self._refuse(HfqKind.CHANGED, f"the file ended inside {what} after it was opened", tensor)
            done += count
        return out

    def chunks(self, entry: TensorEntry, size: int = CHUNK) -> Iterator[NDArray[np.uint8]]:
        """One tensor's payload in pieces of at most `size` bytes."""
        for start in range(0, entry.nbytes, size):
            yield self.read_range(entry, start, min(start + size, entry.nbytes))

    def trailing(self, size: int = CHUNK) -> Iterator[NDArray[np.uint8]]:
        """The bytes after the last payload, in pieces of at most `size` bytes."""
        end = sum(entry.nbytes for entry in self.entries) + self.data_offset
        for start in range(0, self.trailing_bytes, size):
            yield self._read_at(end + start, min(size, self.trailing_bytes - start))

    def _refuse(
        self, kind: HfqKind, problem: str, tensor: str | None = None, hint: str | None = None
    ) -> NoReturn:
        raise HfqError(problem, kind=kind, file=self.path, tensor=tensor, hint=hint) from None

    def _take(self, count: int, what: str) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            self._refuse(
                HfqKind.TRUNCATED,
                f"the file ends inside its {what}",
                hint="it is truncated; fetch or build it again",
            )
        return data

    def _parse(self) -> None:
        try:
            self._parse_header()
        except OSError as e:
            self._refuse(HfqKind.UNREADABLE, f"reading failed: {e.strerror}", hint=hint_of(e))

    def _parse_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if self._file.read(len(MAGIC)) != MAGIC:
            unfinished = "it is unfinished: run the command that writes it again"
            hint = unfinished if self.path.name.endswith(".partial") else None
            self._refuse(HfqKind.NOT_HFQ, "is not an HFQ file: it does not begin with HFQM", hint=hint)
        self._file.seek(0)
        _, self.version, self.arch_id, count, metadata_offset, self.data_offset = HEADER.unpack(
            self._take(HEADER.size, "header")
        )
        self._check_version()
        if metadata_offset != METADATA_OFFSET:
            self._refuse(
                HfqKind.METADATA_OFFSET, f"metadata_offset is {metadata_offset}, not {METADATA_OFFSET}"
            )
        if self.data_offset > size:
            self._refuse(
                HfqKind.DATA_OFFSET, f"payloads begin at byte {self.data_offset}, but the file has {size}"
            )
        self.metadata_bytes = self._read_metadata()
        try:
            self.metadata = parse_object(self.metadata_bytes)
        except JsonError as e:
            self._refuse(HfqKind.METADATA_JSON, f"the metadata {e}")
        index_start = METADATA_OFFSET + len(self.metadata_bytes)
        self._file.seek(index_start)
        tensors = self._read_index(count, self.data_offset - index_start)
        check_index(tensors, self.path)
        self._check_padding()
        self.entries = tuple(place(tensors, self.data_offset))
        end = self.data_offset
        for entry in self.entries:
            end += entry.nbytes
            if end > size:
                self._refuse(
                    HfqKind.PAYLOAD_END,
                    f"the payload ends at byte {end}, but the file has {size}",
                    entry.name,
                    "it is truncated; fetch or build it again",
                )
        self.trailing_bytes = size - end

    def _check_version(self) -> None:
        if self.version == _FORK_VERSION:
            self._refuse(
                HfqKind.VERSION,
                "is an HFQ container of version 2, which a fork of the engine writes; mq-quant reads version 1",
            )
        if self.version != VERSION:
            self._refuse(
                HfqKind.VERSION,
                f"is an HFQ container of version {self.version}; mq-quant reads version {VERSION}",
            )

    def _read_metadata(self) -> bytes:
        scanner, limit = ObjectScanner(), min(METADATA_LIMIT, self.data_offset - METADATA_OFFSET)
        end = None
        while end is None:
            left = limit - len(scanner.buffer)
            chunk = self._file.read(min(left, 1 << 20)) if left > 0 else b""
            if not chunk:
                self._refuse(
                    HfqKind.METADATA_ENDLESS, f"the metadata has no end within {max(limit, 0)} bytes"
                )
            try:
                end = scanner.feed(chunk)
            except JsonError as e:
                self._refuse(HfqKind.METADATA_JSON, f"the metadata {e}")
        return bytes(scanner.buffer[:end])

    def _read_index(self, count: int, room: int) -> list[TensorMeta]:
        """Read the index, which has at most `room` bytes; no count is trusted before that is checked."""
        stated = int.from_bytes(self._take(4, "index"), "little")
        if stated != count:
            self._refuse(HfqKind.COUNTS, f"the header counts {count} tensors, the index {stated}")
        if count > COUNT_LIMIT or count * SMALLEST_ENTRY > room:
            self._refuse(
                HfqKind.TOO_MANY, f"{count} tensors do not fit into an index of {max(room, 0)} bytes"
            )
        tensors: list[TensorMeta] = []
        start = self._file.tell()
        for i in range(count):
            tensors.append(self._read_entry(i))
            if self._file.tell() - start > INDEX_LIMIT:
                self._refuse(HfqKind.INDEX_SIZE, f"the index takes more than {INDEX_LIMIT} bytes")
        if self._file.tell() > self.data_offset:
            self._refuse(HfqKind.INDEX_END, "the index reaches into the payloads")
        return tensors

    def _read_entry(self, i: int) -> TensorMeta:
        raw = self._take(int.from_bytes(self._take(2, "index"), "little"), "index")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(HfqKind.NAME_ENCODING, f"the name of tensor {i} is not UTF-8")
        quant_type, n_dims = self._take(2, "index")
        shape = struct.unpack(f"<{n_dims}I", self._take(4 * n_dims, "index"))
        return TensorMeta(name, quant_type, shape, *ENTRY_TAIL.unpack(self._take(ENTRY_TAIL.size, "index")))

    def _check_padding(self) -> None:
        left = self.data_offset - self._file.tell()
        if left > METADATA_LIMIT:
            self._refuse(HfqKind.PADDING_SIZE, f"{left} unused bytes lie between index and payloads")
        if any(self._take(left, "padding")):
            self._refuse(HfqKind.PADDING, "bytes that are not zero lie between index and payloads")


def open_hfq(path: str | Path) -> HfqFile:
    """Open an HFQ file and check all of its structure; raises HfqError."""
    return HfqFile(path)


def quantization_hash(file: HfqFile) -> str:
    """The quantization hash of a file's index and payloads, read in chunks."""
    digest = QuantizationHash()
    for entry in file.entries:
        digest.update(entry, file.chunks(entry))
    return digest.hexdigest


def write_hfq(
    path: str | Path,
    metadata: Mapping[str, Any] | bytes,
    tensors: Iterable[tuple[TensorMeta, Bytes]],
    arch_id: int = 10,
) -> Layout:
    """Write a whole small file: under a temporary name, synced, then renamed. HfqError where that fails."""
    path, pairs = Path(path), [(meta, byte_view(data)) for meta, data in tensors]
    plan = layout(metadata, [meta for meta, _ in pairs], arch_id)
    for meta, data in pairs:
        if data.nbytes != meta.nbytes:
            raise HfqError(
                f"payload of {data.nbytes} bytes, not {meta.nbytes}", kind=HfqKind.LENGTH, tensor=meta.name
            )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as f:
            f.write(plan.header)
            for _, data in pairs:
                f.write(data)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as e:
        said = disk_error(e, path)
        raise HfqError(said.problem, kind=HfqKind.UNWRITABLE, file=path, hint=said.hint) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return plan
