"""Parts are put together: the file that one machine would have made, byte for byte, from those of many.

Everything is checked on the parts' records before the first byte is copied; each unit's checksum while it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...formats.errors import PartError
from ...formats.hfq import TensorMeta, layout
from ...formats.plain_file import open_plain
from ...formats.watch import UNWATCHED, Watch
from ..spec.metadata import Outcome, complete
from ..write.inputs import check_no_input
from ..write.journal import differences
from ..write.partial_file import Destination, PartialFile
from .parts import HEAD, PartRecord, read_part, reading

PLACE = "source.origin."
"""Keys of a spec that may differ from part to part: where each machine had the source."""


@dataclass(frozen=True)
class MergeResult:
    """A file put together of parts; `resumed_units` of its `units` are those of an earlier run."""

    path: Path
    parts: int
    total_bytes: int
    tensor_count: int
    quantization_hash: str
    units: int
    resumed_units: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What `merge --json` prints."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class _Part:
    path: Path
    file: BinaryIO
    record: PartRecord


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the whole file."""

    line: TensorMeta
    start: int

    @property
    def nbytes(self) -> int:
        return self.line.nbytes

    def meta(self) -> TensorMeta:
        return self.line


@dataclass(frozen=True)
class _Unit:
    """A unit of the whole file, and where its bytes stand in a part."""

    key: str
    start: int
    nbytes: int
    part: _Part
    offset: int
    record: Mapping[str, Any]


@dataclass(frozen=True)
class _Whole:
    """The whole file as its parts tell it."""

    data_offset: int
    total_bytes: int
    tensors: tuple[_Tensor, ...]
    units: tuple[_Unit, ...]

    @classmethod
    def of(cls, parts: Sequence[_Part]) -> _Whole:
        tensors: list[_Tensor] = []
        units: list[_Unit] = []
        start = 0
        for part in parts:
            units += [
                _Unit(u.key, start + u.start, u.nbytes, part, HEAD.size + u.start, u.record)
                for u in part.record.units
            ]
            for line in part.record.metas:
                tensors.append(_Tensor(line, start))
                start += line.nbytes
        laid = layout(parts[0].record.metadata, [t.line for t in tensors])
        return cls(laid.data_offset, laid.total_bytes, tuple(tensors), tuple(units))


def merge_parts(
    paths: Sequence[Path], output: Path, force: bool = False, restart: bool = False, watch: Watch = UNWATCHED
) -> MergeResult:
    """Put parts together, in any order, or continue that.

    Raises PartError where they are not the parts of one file, OutputError where the output cannot be written.
    """
    began = time.monotonic()
    destination = Destination(output, force)
    destination.check(0)
    check_no_input(output, paths)
    with ExitStack() as opened:
        parts = []
        for path in paths:
            with reading(path):
                file = opened.enter_context(open_plain(path))
            parts.append(_Part(path, file, read_part(path, file)))
        parts.sort(key=lambda part: (part.record.first, part.record.last))
        _check(parts)
        whole = _Whole.of(parts)
        destination.check(whole.total_bytes)
        signature = {**_spec(parts[0]), "parts": [_layers(part) for part in parts]}
        with PartialFile(destination, whole, whole.units, signature, restart) as out:
            kept = out.take_over(whole.units, 1, watch)
            watch.begin("copying", sum(u.nbytes for u in whole.units), "bytes")
            for unit in whole.units:
                if unit.key not in kept:
                    _copy(unit, out)
                watch.advance(unit.nbytes, unit.key)
            reports = [report for part in parts for report in part.record.reports]
            outcome = Outcome(
                out.hash.quantization_hash, out.hash.checksums, reports, parts[-1].record.calibration
            )
            metadata = complete(parts[0].record.metadata, outcome)
            path = out.commit(layout(metadata, [t.line for t in whole.tensors]).header)
    return MergeResult(
        path=path,
        parts=len(parts),
        total_bytes=whole.total_bytes,
        tensor_count=len(whole.tensors),
        quantization_hash=outcome.quantization_hash,
        units=len(whole.units),
        resumed_units=len(kept),
        seconds=round(time.monotonic() - began, 3),
    )


def _copy(unit: _Unit, out: PartialFile) -> None:
    """Copy a unit's bytes from its part; PartError where they are not those that were noted."""
    file = unit.part.file.fileno()
    with reading(unit.part.path):
        is_whole = os.fstat(file).st_size >= unit.offset + unit.nbytes
    if is_whole:
        out.copy(unit, file, unit.offset)
    if not is_whole or not out.note(unit, str(unit.record["xxh64"]), _noted(unit)):
        raise PartError(
            f"the bytes of {unit.key} are not those that were written",
            file=unit.part.path,
            hint="copy the part again; the same command continues",
        )


def _noted(unit: _Unit) -> dict[str, Any]:
    """What the journal keeps of a unit besides its key and checksum."""
    return {key: value for key, value in unit.record.items() if key not in ("unit", "xxh64")}


def _spec(part: _Part) -> dict[str, Any]:
    """What decides a part's bytes."""
    return {key: value for key, value in part.record.spec.items() if not key.startswith(PLACE)}


def _layers(part: _Part) -> str:
    return f"{part.record.first}-{part.record.last}"


def _check(parts: Sequence[_Part]) -> None:
    """PartError where parts, by their first layers, are not those of one file, or not all of them."""
    if not parts:
        raise PartError("no part was given", hint="name all parts of the file")
    first = parts[0]
    for part in parts[1:]:
        if _spec(part) != _spec(first):
            lines = "".join(f"\n    {line}" for line in differences(_spec(part), _spec(first))[:8])
            raise PartError(
                f"is of another build than {first.path.name}:{lines}",
                file=part.path,
                hint="build all parts with the same version, inputs and options",
            )
    expected, before = 0, first
    for part in parts:
        if part.record.first < expected:
            raise PartError(
                f"has layer {part.record.first}, which {before.path.name} has too",
                file=part.path,
                hint="give each layer once",
            )
        if part.record.first > expected:
            raise PartError(
                _missing(expected, part.record.first - 1), hint=_build(expected, part.record.first - 1)
            )
        expected, before = part.record.last + 1, part
    if expected < first.record.of:
        raise PartError(_missing(expected, first.record.of - 1), hint=_build(expected, first.record.of - 1))
    keys = list(_keys(parts))
    if len(set(keys)) < len(keys):
        raise PartError("two of the parts hold the same tensors", file=before.path, hint="build them again")


def _keys(parts: Sequence[_Part]) -> Iterator[str]:
    for part in parts:
        yield from (unit.key for unit in part.record.units)


def _missing(first: int, last: int) -> str:
    named = f"layer {first} is" if first == last else f"layers {first} to {last} are"
    return f"{named} in none of the parts"


def _build(first: int, last: int) -> str:
    return f"build them with --layers {first}-{last}, or name the part that has them"
