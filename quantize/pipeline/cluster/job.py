"""What a worker of a cluster is told, and what it answers: plain data, no payload among it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....formats.checkpoint.local import Checkpoint
from ....formats.errors import MqError
from ....formats.unchanged import KnownHash
from ...spec.places import TINY
from ...spec.recipe import Place, Recipe
from ..build_spec import BuildSpec
from ..statistics import ImatrixFile, MomentFolder, OnTheFly, Statistics
from .delivery import Target


@dataclass(frozen=True)
class Job:
    """A build, as a worker opens it. `hashes` are those of shards in a folder, which the driver has computed;
    `signature` is that of the driver's spec.
    """

    recipe: Recipe
    statistics: Statistics | None
    hashes: Mapping[str, KnownHash]
    signature: Mapping[str, Any]
    target: Target
    threads: int
    device: str
    shard_cache: int

    @classmethod
    def of(cls, spec: BuildSpec, target: Target, threads: int, device: str, shard_cache: int) -> Job:
        """The job of a driver's spec; paths are made absolute, since workers have other working folders."""
        recipe, hashes = spec.recipe, dict[str, KnownHash]()
        if isinstance(spec.source, Checkpoint):
            hashes = spec.source.known_hashes()
            if recipe.model.place.address != TINY:
                place = Place(folder=str(spec.source.path.absolute()))
                recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"place": place})})
        statistics = _absolute(spec.statistics)
        return cls(recipe, statistics, hashes, spec.signature, target, threads, device, shard_cache)


def _absolute(statistics: Statistics | None) -> Statistics | None:
    match statistics:
        case ImatrixFile(path):
            return ImatrixFile(path.absolute())
        case MomentFolder(folder, imatrix):
            return MomentFolder(folder.absolute(), _path(imatrix))
        case OnTheFly(tokens, _, imatrix, _, state):
            return replace(
                statistics,
                tokens=replace(tokens, text=_path(tokens.text), tokens=_path(tokens.tokens)),
                imatrix=_path(imatrix),
                state=_path(state),
            )
        case _:
            return statistics


def _path(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


@dataclass(frozen=True)
class Slice:
    """Units that one task encodes: their keys, each with the place of its bytes in the output."""

    name: str
    units: tuple[tuple[str, int], ...]
    weights: int


@dataclass(frozen=True)
class Shard:
    """A shard that one task hashes, where the driver sees it."""

    name: str
    path: str


@dataclass(frozen=True)
class Stands:
    """A unit whose bytes stand in the output: their xxh64, and what the journal says of it besides."""

    key: str
    digest: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What became of a slice or a shard on a node, in so many seconds: units stand, it is hashed, or it failed."""

    node: str
    pid: int
    seconds: float
    units: tuple[Stands, ...] = ()
    hashed: KnownHash | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Failure:
    """An error of a worker in plain values: exceptions with arguments of their own do not travel well."""

    message: str
    hint: str | None
    exit_code: int

    @classmethod
    def of(cls, error: MqError) -> Failure:
        """The parts of an error that its user sees."""
        where = ": ".join(part for part in (error.file, error.tensor) if part)
        return cls(f"{where}: {error.problem}" if where else error.problem, error.hint, error.exit_code)
