"""Parts of a file: runs of layers that machines encode on their own, each in a file of its own until they are merged.

A part holds the bytes of its layers as they will stand in the whole file. The embedding goes with the first layer, the
last norm and the head with the last one. Behind the payloads stands a record of everything that a merge needs, so that
it reads neither the source nor a recipe; at the front stand the record's place and checksum.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...formats.errors import PartError, RecipeError
from ...formats.hfq import TensorMeta
from ...formats.minimax import parse_config
from ...formats.strictjson import JsonError, dump_object, parse_object
from ..spec.places import model_files
from ..spec.plan import PlannedTensor
from ..spec.recipe import Recipe
from ..write.journal import Record
from .build_spec import BuildSpec
from .work_units import WorkUnit

MAGIC = b"MQPART01"
HEAD = struct.Struct("<8sQQ8s")
"""Magic, the record's offset and length, and its xxh64."""
DEPTH = 64
"""Levels to which a record may nest."""


@dataclass(frozen=True)
class LayerRange:
    """Layers first to last, both included, of a model of so many."""

    first: int
    last: int
    of: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @classmethod
    def parse(cls, layers: str | None, part: str | None, of: int) -> LayerRange:
        """From `24-31` or `7`, or from `3/8`, which is the third of eight parts as equal as can be; RecipeError."""
        if layers is not None:
            found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", layers)
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
            if not 0 <= first <= last < of:
                raise RecipeError(
                    f"--layers {layers} names no layers of this model, which has 0 to {of - 1}",
                    hint="give a number, or the first and the last one, as in --layers 8-15",
                )
            return cls(first, last, of)
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part or "")
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count <= of:
            raise RecipeError(
                f"--part {part} is no part of this model, which has {of} layers",
                hint="give its number and how many there are, as in --part 3/8",
            )
        return cls(of * (number - 1) // count, of * number // count - 1, of)


def part_of(recipe: Recipe, layers: str | None, part: str | None) -> LayerRange | None:
    """The part that was asked for, of the recipe's model; None where the whole file is wanted."""
    if layers is None and part is None:
        return None
    config = parse_config(model_files(recipe.model).config)
    return LayerRange.parse(layers, part, config.num_hidden_layers)


@dataclass(frozen=True)
class PartLayout:
    """A part's file before its record: `tensors` and `units` count their bytes from the part's first one, which stands
    at `start` of the whole file's payloads.
    """

    layers: LayerRange
    start: int
    tensors: tuple[PlannedTensor, ...]
    units: tuple[WorkUnit, ...]
    data_offset: int = HEAD.size

    @property
    def total_bytes(self) -> int:
        return self.data_offset + self.tensors[-1].start + self.tensors[-1].nbytes

    @classmethod
    def of(cls, spec: BuildSpec, order: Sequence[WorkUnit], layers: LayerRange) -> PartLayout:
        """The part of a build with these layers; `order` is that of the whole file's units."""
        first_layer = min(t.start for t in spec.plan.tensors if t.layer is not None)

        def layer_of(tensor: PlannedTensor) -> int:
            if tensor.layer is not None:
                return tensor.layer
            return 0 if tensor.start < first_layer else layers.of - 1

        def mine(tensor: PlannedTensor) -> bool:
            return layers.first <= layer_of(tensor) <= layers.last

        start = min(t.start for t in spec.plan.tensors if mine(t))

        def moved(tensor: PlannedTensor) -> PlannedTensor:
            return replace(tensor, start=tensor.start - start)

        units = tuple(
            replace(unit, start=unit.start - start, tensors=tuple(map(moved, unit.tensors)))
            for unit in order
            if mine(unit.tensors[0])
        )
        return cls(layers, start, tuple(moved(t) for t in spec.plan.tensors if mine(t)), units)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredUnit(_Strict):
    """One unit's bytes in a part, and the journal's line of it."""

    key: str
    start: int = Field(ge=0)
    nbytes: int = Field(ge=0, lt=1 << 40)
    record: dict[str, Any]


class PartRecord(_Strict):
    """What a part says of itself. `spec` is the build's signature, `metadata` what the whole file will say but for what
    is known at the end; `calibration` is known in the part with the last layer.
    """

    spec: dict[str, Any]
    metadata: dict[str, Any]
    first: int = Field(ge=0)
    last: int = Field(ge=0)
    of: int = Field(ge=1)
    tensors: list[tuple[str, int, list[int], int, int]]
    units: list[StoredUnit]
    reports: list[dict[str, Any]]
    calibration: dict[str, Any] | None

    @property
    def metas(self) -> list[TensorMeta]:
        """The part's lines of the index."""
        return [
            TensorMeta(n, kind, tuple(shape), group, size) for n, kind, shape, group, size in self.tensors
        ]


def sealed(
    spec: BuildSpec,
    part: PartLayout,
    done: Mapping[str, Record],
    reports: Sequence[Mapping[str, Any]],
    calibration: Mapping[str, Any] | None,
) -> tuple[bytes, bytes]:
    """What stands before a finished part's payloads, and behind them; `done` has the journal's line of each unit."""
    in_file = sorted(part.units, key=lambda unit: unit.start)
    metas = [t.meta() for t in part.tensors]
    record = {
        "spec": dict(spec.signature),
        "metadata": dict(spec.metadata),
        "first": part.layers.first,
        "last": part.layers.last,
        "of": part.layers.of,
        "tensors": [[m.name, m.quant_type, list(m.shape), m.group_size, m.nbytes] for m in metas],
        "units": [
            {"key": u.key, "start": u.start, "nbytes": u.nbytes, "record": done[u.key]} for u in in_file
        ],
        "reports": list(reports),
        "calibration": calibration,
    }
    text = dump_object(record)
    return HEAD.pack(MAGIC, part.total_bytes, len(text), xxhash.xxh64_digest(text)), text


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Faults of the file system while a part is opened or read, as PartError."""
    try:
        yield
    except OSError as e:
        raise PartError(f"cannot be read: {e.strerror or e}", file=path, hint="check the path") from None


def read_part(path: Path, file: BinaryIO) -> PartRecord:
    """What an open part says of itself; PartError where it is none, or was cut short or changed."""
    with reading(path):
        head = file.read(HEAD.size)
        size = file.seek(0, 2)
        if len(head) < HEAD.size or not head.startswith(MAGIC):
            raise PartError(
                "is no part of a build", file=path, hint="give files that `build --part` has made"
            )
        _, offset, length, digest = HEAD.unpack(head)
        if offset + length != size:
            raise PartError(
                f"has {size} bytes, and should have {offset + length}",
                file=path,
                hint="copy or build it again",
            )
        file.seek(offset)
        text = file.read(length)
    if xxhash.xxh64_digest(text) != digest:
        raise PartError(
            "its record has another checksum than was noted for it", file=path, hint="copy it again"
        )
    try:
        record = PartRecord.model_validate_json(dump_object(parse_object(text, DEPTH)))
    except (JsonError, ValidationError) as e:
        first = str(e).splitlines()[0]
        raise PartError(f"its record cannot be read: {first}", file=path, hint="build it again") from None
    _check(path, record, offset - HEAD.size)
    return record


def _check(path: Path, record: PartRecord, payload_bytes: int) -> None:
    """PartError where a record contradicts itself: units and tensors cover the same bytes without holes."""
    at = 0
    for unit in record.units:
        if unit.start != at or "xxh64" not in unit.record:
            raise PartError(f"its record has a hole before {unit.key}", file=path, hint="build it again")
        at += unit.nbytes
    if at != payload_bytes or at != sum(meta.nbytes for meta in record.metas):
        raise PartError("its record does not fit its bytes", file=path, hint="build it again")
    if not record.first <= record.last < record.of:
        raise PartError("its record names no layers", file=path, hint="build it again")
