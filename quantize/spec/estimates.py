"""Sizes before the work: of a file, and of the memory and disk that building it or calibrating for it takes.

Everything follows from a recipe and a config.json; no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...formats.hfq.totals import FormatTotals
from ...formats.machine import cores, memory
from ...formats.minimax import ModelConfig, inventory, parse_config
from .calibration_sizes import (
    BASE_MEMORY,
    USUAL_TOKENS,
    CalibrationSizes,
    calibration_sizes,
    moment_bytes,
    tuning_bytes,
    usual_tokens,
)
from .efforts import ALONE, EffortCost, Share, default_effort, effort_costs
from .metadata import template, totals_of
from .places import TINY, ModelFiles, choose_recipe, local_folder, model_files
from .plan import ROW_WEIGHTS, Plan, make_plan, plan_tensors
from .recipe import FITTED, Effort, Model, Recipe, fitted_tiers
from .recipe import tiers as tier_names
from .running import NOTE, machine_for, run_bytes
from .tally import FileSizes, file_sizes

COPIES = 7
"""How often a worker of a build holds the weights it encodes, counted in f32."""
_STORED_BYTES = {"fp8": 1, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class PlanSummary:
    """What a build will take. `disk_bytes` counts the file and the shards that are streamed for it; it is None where
    nobody has said how many shards the repository has. `memory` is the smallest usual memory that the file runs in,
    `run_bytes` what the engine takes there. `metadata_complete` is false where the tokenizer is not at hand, so that
    the file will be a little larger. `warnings` say what the engine does with such a file."""

    tier: str
    model: str
    total_bytes: int
    payload_bytes: int
    metadata_bytes: int
    tensor_count: int
    by_format: Mapping[str, FormatTotals]
    memory: str
    run_bytes: int
    peak_memory_bytes: int
    disk_bytes: int | None
    calibration: CalibrationSizes
    efforts: tuple[EffortCost, ...]
    device: str
    metadata_complete: bool
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Tier:
    """One tier: the size of its file, the smallest usual memory that it runs in, what it takes there, and what the
    engine does with it that one should know.
    """

    tier: str
    total_bytes: int
    memory: str
    run_bytes: int
    description: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class TierTable:
    """All tiers, the largest first; `memory_note` says what `memory` counts."""

    tiers: tuple[Tier, ...]
    memory_note: str

    def as_json(self) -> dict[str, Any]:
        return {"tiers": [asdict(tier) for tier in self.tiers], "memory_note": self.memory_note}


@dataclass(frozen=True)
class PlanTable:
    """What building takes, for all tiers: their sizes, and the efforts, which cost the same for each of them.

    `streamed_bytes` is the disk of shards beside the file, None where it is not known; `machine_bytes` is the memory of
    this machine.
    """

    model: str
    table: TierTable
    streamed_bytes: int | None
    efforts: tuple[EffortCost, ...]
    device: str
    jobs: int
    machine_bytes: int

    def as_json(self) -> dict[str, Any]:
        mine = {key: value for key, value in asdict(self).items() if key != "table"}
        return {**mine, **self.table.as_json()}


def offline_plan(recipe: Recipe, files: ModelFiles) -> Plan:
    """A plan from config and texts alone; what a build adds to the metadata changes its size by little."""
    config = parse_config(files.config)
    tensors = plan_tensors(recipe, config)
    metadata = template(files.config, files.side, config, totals_of(tensors), {"recipe": recipe.resolved()})
    return make_plan(recipe, config, tensors, metadata)


def plan_summary(
    tier: str | None,
    path: Path | None,
    source: str | None,
    jobs: int | None,
    shard_cache: int = 2,
    device: str = "cpu",
) -> PlanSummary:
    """The sizes of a build with so many worker threads and shards on the disk; efforts are counted for `device`.

    Raises RecipeError, ConfigError or WeightError where the recipe and the model do not fit each other.
    """
    return summary_of(choose_recipe(tier, path, source), jobs, shard_cache, device)


def summary_of(recipe: Recipe, jobs: int | None, shard_cache: int = 2, device: str = "cpu") -> PlanSummary:
    """As `plan_summary`, of a recipe that is at hand."""
    files = model_files(recipe.model)
    sizes = file_sizes(recipe, files, parse_config(files.config))
    streamed = streamed_bytes(recipe.model, sizes.config, shard_cache)
    workers = jobs or cores()
    return PlanSummary(
        recipe.tier,
        recipe.model.name,
        sizes.total_bytes,
        sizes.payload_bytes,
        sizes.metadata_bytes,
        sizes.tensor_count,
        sizes.by_format,
        machine_for(sizes.total_bytes, sizes.config),
        run_bytes(sizes.total_bytes, sizes.config),
        build_memory(sizes, workers),
        None if streamed is None else sizes.total_bytes + streamed,
        calibration_sizes(sizes.config, USUAL_TOKENS, "compact"),
        costs(recipe, sizes, workers, device),
        device,
        files.complete,
        tuple(fact.warning for fact in sizes.concerns),
    )


def tier_table(source: str | None = None) -> TierTable:
    """The bundled tiers for the released model, or for another source."""
    return table_of([(recipe, sizes) for recipe, sizes in _tiers(source)])


def plan_table(source: str | None, jobs: int | None, shard_cache: int = 2, device: str = "cpu") -> PlanTable:
    """What building each of the bundled tiers takes, for the released model or for another source."""
    rows, workers = list(_tiers(source)), jobs or cores()
    recipe, sizes = rows[0]
    streamed = streamed_bytes(recipe.model, sizes.config, shard_cache)
    efforts = costs(recipe, sizes, workers, device)
    return PlanTable(recipe.model.name, table_of(rows), streamed, efforts, device, workers, memory())


def _tiers(source: str | None) -> Iterator[tuple[Recipe, FileSizes]]:
    """The standard tiers, and those that were fitted to a memory where this model's files run in it."""
    for tier in tier_names():
        yield sized(tier, source)
    for tier in fitted_tiers() if source != TINY else ():
        recipe, sizes = sized(tier, source)
        if machine_for(sizes.total_bytes, sizes.config) == f"{tier.removeprefix(FITTED)} GB":
            yield recipe, sizes


def sized(tier: str, source: str | None) -> tuple[Recipe, FileSizes]:
    """A bundled tier for the released model, or for another source, and the sizes of its file."""
    recipe = choose_recipe(tier, None, source)
    files = model_files(recipe.model)
    return recipe, file_sizes(recipe, files, parse_config(files.config))


def table_of(rows: Sequence[tuple[Recipe, FileSizes]]) -> TierTable:
    """The rows as a table."""
    tiers = [
        Tier(
            recipe.tier,
            sizes.total_bytes,
            machine_for(sizes.total_bytes, sizes.config),
            run_bytes(sizes.total_bytes, sizes.config),
            recipe.description,
            tuple(fact.warning for fact in sizes.concerns),
        )
        for recipe, sizes in rows
    ]
    return TierTable(tuple(sorted(tiers, key=lambda row: -row.total_bytes)), NOTE)


# --- parts of a size ------------------------------------------------------------------------------------------------


def is_local(model: Model) -> bool:
    """Whether a model's weights lie on this machine."""
    address = model.place.address
    return address == TINY or local_folder(address) is not None


def streamed_bytes(model: Model, config: ModelConfig, shard_cache: int) -> int | None:
    """The disk that streamed shards take beside the file; None where nobody has said how many shards there are."""
    shards = model.place.shards
    if shards is None:
        return 0 if is_local(model) else None
    return shard_cache * -(-source_bytes(config) // shards)


def costs(
    recipe: Recipe, sizes: FileSizes, workers: int, device: str, share: Share = ALONE
) -> tuple[EffortCost, ...]:
    """What each effort takes on this machine with so many workers, or on a GPU of it, for tiers of this `share`.

    Each worker holds an expert's payloads for every tier, and where moments are known two Hessians of gate and up.
    """
    config = sizes.config
    expert = 3 * config.hidden_size * config.intermediate_size
    plain = build_memory(sizes, workers) + (share.tiers - 1) * workers * expert
    rounding = plain + moment_bytes(config, workers)
    rounding += 8 * config.hidden_size**2 * workers if share.tiers > 1 else 0
    training = tuning_bytes(config, usual_tokens(config, device))
    memories: dict[Effort, int] = {
        "imatrix": plain,
        "calibrated": rounding,
        "tuned": max(rounding, training),
    }
    download = None if is_local(recipe.model) else source_bytes(config)
    default = default_effort(recipe, config, workers, device)
    return effort_costs(config, workers, memories, download, default, device, share)


def source_bytes(config: ModelConfig) -> int:
    """Bytes of a released checkpoint's tensors: FP8 with f32 scales per block, BF16, F32."""
    rows, columns = config.block_shape
    total = 0
    for spec in inventory(config):
        total += math.prod(spec.shape) * _STORED_BYTES[spec.stored]
        if spec.stored == "fp8":
            total += 4 * -(-spec.shape[0] // rows) * -(-spec.shape[1] // columns)
    return total


def build_memory(sizes: FileSizes, jobs: int) -> int:
    """An estimate of a build's peak memory in bytes.

    Each worker holds one expert (or one piece of a plain tensor) as f32 with the encoder's copies of it; the
    interpreter and its libraries, and the importance of two layers, come on top.
    """
    return worker_memory(sizes.config, sizes.largest, jobs)


def worker_memory(config: ModelConfig, largest: int, jobs: int) -> int:
    """As `build_memory`, of one process with so many workers; `largest` counts the weights of the largest tensor."""
    expert = 3 * config.hidden_size * config.intermediate_size
    plain = min(largest, ROW_WEIGHTS)
    importance = 2 * config.num_local_experts * (2 * config.hidden_size + config.intermediate_size) * 8
    return BASE_MEMORY + importance + 4 * COPIES * max(expert, plain) * jobs
