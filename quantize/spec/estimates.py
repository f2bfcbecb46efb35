"""Sizes before the work: of a file, and of the memory and disk that building it or calibrating for it takes.

Everything follows from a recipe and a config.json; no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...formats.hfq.totals import FormatTotals
from ...formats.machine import cores
from ...formats.minimax import ModelConfig, inventory, parse_config
from .calibration_sizes import (
    BASE_MEMORY,
    USUAL_TOKENS,
    CalibrationSizes,
    calibration_sizes,
    moment_bytes,
)
from .efforts import EffortCost, default_effort, effort_costs
from .metadata import template, totals_of
from .places import TINY, ModelFiles, choose_recipe, local_folder, model_files
from .plan import ROW_WEIGHTS, Plan, make_plan, plan_tensors
from .recipe import Recipe, load_tier
from .recipe import tiers as tier_names
from .tally import FileSizes, file_sizes

if TYPE_CHECKING:
    pass

MACHINES_GB = (16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256)
CONTEXT = 32768
"""Positions of the key/value cache that a machine must have room for beside the file."""
HEADROOM_GB = 2.0
COPIES = 7
"""How often a worker of a build holds the weights it encodes, counted in f32."""
_STORED_BYTES = {"fp8": 1, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class PlanSummary:
    """What a build will take. `disk_bytes` counts the file and the shards that are streamed for it; it is None where
    nobody has said how many shards the repository has. `metadata_complete` is false where the tokenizer is not at hand,
    so that the file will be a little larger."""

    tier: str
    model: str
    total_bytes: int
    payload_bytes: int
    metadata_bytes: int
    tensor_count: int
    by_format: Mapping[str, FormatTotals]
    peak_memory_bytes: int
    disk_bytes: int | None
    calibration: CalibrationSizes
    efforts: tuple[EffortCost, ...]
    metadata_complete: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Tier:
    """One tier: the size of its file, and the smallest usual memory that it runs in."""

    tier: str
    total_bytes: int
    memory: str
    description: str


@dataclass(frozen=True)
class TierTable:
    """All tiers, the largest first; `memory_note` says what `memory` counts."""

    tiers: tuple[Tier, ...]
    memory_note: str

    def as_json(self) -> dict[str, Any]:
        return {"tiers": [asdict(tier) for tier in self.tiers], "memory_note": self.memory_note}


def offline_plan(recipe: Recipe, files: ModelFiles) -> Plan:
    """A plan from config and texts alone; what a build adds to the metadata changes its size by little."""
    config = parse_config(files.config)
    tensors = plan_tensors(recipe, config)
    metadata = template(files.config, files.side, config, totals_of(tensors), {"recipe": recipe.resolved()})
    return make_plan(recipe, config, tensors, metadata)


def plan_summary(
    tier: str | None, path: Path | None, source: str | None, jobs: int | None, shard_cache: int = 2
) -> PlanSummary:
    """The sizes of a build with so many worker threads and shards on the disk.

    Raises RecipeError, ConfigError or WeightError where the recipe and the model do not fit each other.
    """
    recipe = choose_recipe(tier, path, source)
    files = model_files(recipe.model)
    sizes = file_sizes(recipe, files, parse_config(files.config))
    shards = recipe.model.place.shards
    streamed = shard_cache * -(-source_bytes(sizes.config) // shards) if shards else 0
    local = local_folder(recipe.model.place.address) is not None or recipe.model.place.address == TINY
    known = shards is not None or local
    workers = jobs or cores()
    memory = build_memory(sizes, workers)
    return PlanSummary(
        recipe.tier,
        recipe.model.name,
        sizes.total_bytes,
        sizes.payload_bytes,
        sizes.metadata_bytes,
        sizes.tensor_count,
        sizes.by_format,
        memory,
        sizes.total_bytes + streamed if known else None,
        calibration_sizes(sizes.config, USUAL_TOKENS, "compact"),
        effort_costs(
            sizes.config,
            workers,
            {"imatrix": memory, "calibrated": memory + moment_bytes(sizes.config, workers)},
            None if local else source_bytes(sizes.config),
            default_effort(recipe, sizes.config, workers),
        ),
        files.complete,
    )


def tier_table(source: str | None = None) -> TierTable:
    """The bundled tiers for the released model, or for another source."""
    rows = []
    for tier in tier_names():
        recipe = choose_recipe(tier, None, source) if source else load_tier(tier)
        files = model_files(recipe.model)
        sizes = file_sizes(recipe, files, parse_config(files.config))
        memory = machine_for(sizes.total_bytes, sizes.config)
        rows.append(Tier(tier, sizes.total_bytes, memory, recipe.description))
    note = f"fits in: the file, a key/value cache of {CONTEXT} tokens, and {HEADROOM_GB:.0f} GB for the rest"
    return TierTable(tuple(sorted(rows, key=lambda row: -row.total_bytes)), note)


# --- parts of a size ------------------------------------------------------------------------------------------------


def source_bytes(config: ModelConfig) -> int:
    """Bytes of a released checkpoint's tensors: FP8 with f32 scales per block, BF16, F32."""
    rows, columns = config.block_shape
    total = 0
    for spec in inventory(config):
        total += math.prod(spec.shape) * _STORED_BYTES[spec.stored]
        if spec.stored == "fp8":
            total += 4 * -(-spec.shape[0] // rows) * -(-spec.shape[1] // columns)
    return total


def kv_bytes(config: ModelConfig, positions: int) -> int:
    """Bytes of an f16 key/value cache of that many positions."""
    return positions * config.num_hidden_layers * 2 * config.kv_dim * 2


def machine_for(total_bytes: int, config: ModelConfig) -> str:
    """The smallest usual memory that holds the file, the key/value cache of CONTEXT tokens and a little more."""
    need = (total_bytes + kv_bytes(config, CONTEXT)) / 1e9 + HEADROOM_GB
    return next((f"{size} GB" for size in MACHINES_GB if size >= need), f"{need:.0f} GB")


def build_memory(sizes: FileSizes, jobs: int) -> int:
    """An estimate of a build's peak memory in bytes.

    Each worker holds one expert (or one piece of a plain tensor) as f32 with the encoder's copies of it; the
    interpreter and its libraries, and the importance of two layers, come on top.
    """
    c = sizes.config
    expert = 3 * c.hidden_size * c.intermediate_size
    plain = min(sizes.largest, ROW_WEIGHTS)
    importance = 2 * c.num_local_experts * (2 * c.hidden_size + c.intermediate_size) * 8
    return BASE_MEMORY + importance + 4 * COPIES * max(expert, plain) * jobs
