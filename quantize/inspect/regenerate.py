"""`mq-quant regenerate`: some layers of every tier made again from the source, and compared with committed hashes.

The source is read once: all tiers are made of a layer while its shards are here. Nothing is written but the table of
hashes, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from ...formats.checkpoint.held import HeldSource
from ...formats.errors import InputError, RecipeError
from ...formats.hfq import HfqFile, TensorMeta, open_hfq
from ...formats.hfq.provenance import Provenance
from ...formats.own_file import check_place
from ...formats.watch import UNWATCHED, Watch
from ..pipeline.build_spec import UNCHANGED, BuildSpec, resolve
from ..pipeline.encoding import Encoded
from ..pipeline.statistics import ImatrixFile
from ..pipeline.work_units import WorkUnit, work_order
from ..pipeline.worker_pool import Workers, run_units
from ..spec.layer_hashes import (
    HashTable,
    bundled_table,
    empty_table,
    file_hashes,
    layer_hash,
    read_table,
)
from ..spec.places import checked_place, choose_recipe
from ..spec.recipe import tiers
from ..write.atomic import write_atomic


@dataclass(frozen=True)
class Wanted:
    """What is made again: layers (None: the first, one in the middle and the last) of tiers (none given: all) of a
    source (None: the recipes' own), under an imatrix (None: the recipes' own).

    `table` is a file of hashes to compare with, in place of the bundled one.
    """

    layers: tuple[int, ...] | None = None
    tiers: tuple[str, ...] = ()
    source: str | None = None
    revision: str | None = None
    imatrix: Path | None = None
    table: Path | None = None
    jobs: int = 1
    shard_cache: int = 4


@dataclass(frozen=True)
class LayerRow:
    """One layer of one tier; `committed` is None where nobody has committed a hash of it."""

    tier: str
    layer: int
    hash: str
    committed: str | None

    @property
    def differs(self) -> bool:
        return self.committed is not None and self.committed != self.hash


@dataclass(frozen=True)
class Regeneration:
    """All layers that were made again. It holds where no hash differs from the committed one."""

    model: str
    rows: tuple[LayerRow, ...]
    table: HashTable
    written: Path | None = None

    @property
    def same(self) -> bool:
        return not any(row.differs for row in self.rows)

    @property
    def unknown(self) -> int:
        """How many of the layers have no committed hash."""
        return sum(row.committed is None for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """What `regenerate --json` prints."""
        return {
            "model": self.model,
            "same": self.same,
            "unknown": self.unknown,
            "layers": [{**asdict(row), "differs": row.differs} for row in self.rows],
            "written": str(self.written) if self.written else None,
        }


def regenerate(wanted: Wanted, watch: Watch = UNWATCHED) -> Regeneration:
    """Make layers again and hold them against the committed hashes.

    Raises RecipeError for layers and tiers that are not there, and the errors of a source and imatrix as a build does.
    """
    names = wanted.tiers or tuple(tiers())
    recipes = [choose_recipe(tier, None, wanted.source, wanted.revision) for tier in names]
    model, place = recipes[0].model, recipes[0].model.place
    statistics = ImatrixFile(wanted.imatrix) if wanted.imatrix else None
    with checked_place(place.address, place.revision, wanted.shard_cache, Path()) as opened:
        layers = _layers(wanted.layers, opened.config.num_hidden_layers)
        source = HeldSource(opened)
        specs = [
            resolve(UNCHANGED.apply(recipe, statistics), statistics, source, watch=watch)
            for recipe in recipes
        ]
        made = _Inputs(model.name, place.repository, *_inputs_of(specs[0]))
        table = made.table(wanted.table)
        units = {layer: [_units(spec, layer) for spec in specs] for layer in layers}
        total = sum(unit.weights for of in units.values() for some in of for unit in some)
        watch.begin("encoding", total, "weights")
        found: dict[str, dict[int, str]] = {recipe.tier: {} for recipe in recipes}
        for layer, of in units.items():
            source.hold([t.name for unit in of[0] for t in unit.tensors if t.spec])
            for spec, todo in zip(specs, of, strict=True):
                checksums = _made(spec, todo, wanted.jobs, watch.advance)
                found[spec.recipe.tier][layer] = _hash(spec, layer, checksums)
            source.let_go()
    return _compared(table, found)


def regenerated_from(paths: Sequence[Path], table_path: Path | None) -> Regeneration:
    """The hashes of all layers of finished files, from the checksums that they state, beside those of a table.

    Raises InputError for a file whose layers are not of a build under an imatrix alone: such a layer cannot be made
    again by itself.
    """
    found: dict[str, dict[int, str]] = {}
    made: _Inputs | None = None
    for path in paths:
        with open_hfq(path) as file:
            tier, inputs = _built_under(file)
            if made is not None and inputs != made:
                raise InputError("was made from other inputs than the file before", file=path)
            made = inputs
            found[tier] = file_hashes(file)
            if not found[tier]:
                raise InputError("does not state a checksum of each tensor", file=path)
    if made is None:
        raise RecipeError("no files were given")
    return _compared(made.table(table_path), found)


def write_table(result: Regeneration, path: Path) -> Regeneration:
    """Write the table with the hashes of a regeneration; those of other layers stay. OutputError where it cannot."""
    found: dict[str, dict[int, str]] = {}
    for row in result.rows:
        found.setdefault(row.tier, {})[row.layer] = row.hash
    check_place(path)
    write_atomic(path, [memoryview(result.table.with_hashes(found).text().encode())])
    return Regeneration(result.model, result.rows, result.table, path)


@dataclass(frozen=True)
class _Inputs:
    """What hashes of layers are of; a revision and an imatrix's hash are None where there are none."""

    model: str
    repository: str | None
    revision: str | None
    imatrix_sha256: str | None

    def table(self, path: Path | None) -> HashTable:
        """The table in a file, which may not be there yet, or the bundled one; InputError for one of other inputs."""
        if path is not None:
            table = read_table(path) if path.exists() else empty_table(self.model)
        else:
            table = bundled_table(self.repository) or empty_table(self.model)
        for key in ("model", "revision", "imatrix_sha256"):
            committed, mine = getattr(table, key), getattr(self, key)
            if None not in (committed, mine) and committed != mine:
                raise InputError(
                    f"the committed hashes are of another {key}: {committed}, and here it is {mine}",
                    file=path,
                    hint="give the source, --revision and --imatrix that they were made with, or begin a new table",
                )
        mine = {key: getattr(self, key) for key in ("revision", "imatrix_sha256") if getattr(self, key)}
        return table.model_copy(update=mine)


def _inputs_of(spec: BuildSpec) -> tuple[str | None, str | None]:
    """The revision of a spec's source, and the hash of its imatrix."""
    return spec.source.origin.get("revision"), spec.signature.get("imatrix.sha256")


def _built_under(file: HfqFile) -> tuple[str, _Inputs]:
    """A file's tier and what it was made from; InputError where its layers cannot be made again by themselves."""
    record = Provenance.of(file)
    recipe = record.recipe
    if record.calibration is not None or record.tuned_layers or record.imatrix is None:
        raise InputError(
            "was not built under an imatrix alone, so its layers cannot be made again one by one",
            file=file.path,
            hint="take a file of --effort imatrix",
        )
    if recipe is None or recipe.tier is None or recipe.model is None:
        raise InputError("does not say of which tier and model it is", file=file.path)
    revision = record.source.origin.get("revision") if record.source else None
    revision = revision if isinstance(revision, str) else None
    return recipe.tier, _Inputs(recipe.model, recipe.repository, revision, record.imatrix.sha256)


def _layers(asked: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    if asked is None:
        return tuple(dict.fromkeys((0, (count - 1) // 2, count - 1)))
    wrong = [layer for layer in asked if not 0 <= layer < count]
    if wrong:
        raise RecipeError(
            f"there is no layer {wrong[0]}: the model has {count}", hint=f"--layers takes 0 to {count - 1}"
        )
    return tuple(sorted(set(asked)))


def _units(spec: BuildSpec, layer: int) -> list[WorkUnit]:
    return [unit for unit in work_order(spec) if unit.layer == layer]


def _made(
    spec: BuildSpec, todo: Sequence[WorkUnit], jobs: int, advance: Callable[[int, str], None]
) -> Mapping[str, str]:
    """The checksum of each tensor of some units."""
    checksums: dict[str, str] = {}

    def take(unit: WorkUnit, done: Encoded) -> None:
        for tensor in unit.tensors:
            at = tensor.start - unit.start
            checksums[tensor.name] = xxhash.xxh64_hexdigest(done.payload[at : at + tensor.nbytes].data)
        advance(unit.weights, f"{spec.recipe.tier}, {unit.key}")

    run_units(spec, todo, take, Workers(jobs))
    return checksums


def _hash(spec: BuildSpec, layer: int, checksums: Mapping[str, str]) -> str:
    metas: list[TensorMeta] = [t.meta() for t in spec.plan.tensors if t.layer == layer]
    return layer_hash((meta, checksums[meta.name]) for meta in metas)


def _compared(table: HashTable, found: Mapping[str, Mapping[int, str]]) -> Regeneration:
    rows = tuple(
        LayerRow(tier, layer, value, table.of(tier, layer))
        for tier, hashes in found.items()
        for layer, value in hashes.items()
    )
    return Regeneration(table.model, rows, table)
