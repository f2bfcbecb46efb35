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
from .metadata import template, totals_of
from .places import ModelFiles, choose_recipe, local_folder, model_files
from .plan import ROW_WEIGHTS, Plan, make_plan, plan_tensors
from .recipe import Recipe, load_tier
from .recipe import tiers as tier_names
from .tally import FileSizes, file_sizes

if TYPE_CHECKING:
    from ...formats.statistics.moment_file import DownForm

MACHINES_GB = (16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256)
CONTEXT = 32768
"""Positions of the key/value cache that a machine must have room for beside the file."""
HEADROOM_GB = 2.0
BASE_MEMORY = 900 << 20
"""Bytes that the interpreter and its libraries take."""
COPIES = 7
"""How often a worker of a build holds the weights it encodes, counted in f32."""
CHUNK = 4096
"""Rows of activations turned to f64 at a time by a calibration."""
USUAL_TOKENS = 128 * 512
_STORED_BYTES = {"fp8": 1, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class CalibrationSizes:
    """Bytes that a calibration on `tokens` tokens takes: of memory at its peak, of one layer's file, of the finished
    folder, and of the residual stream that lies beside it until then."""

    tokens: int
    memory_bytes: int
    layer_bytes: int
    folder_bytes: int
    unfinished_bytes: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class InlineSizes:
    """Bytes that a build which calibrates itself takes: of memory at its peak, and of disk beside its output."""

    tokens: int
    memory_bytes: int
    disk_bytes: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


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
    calibrate_inline: InlineSizes
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
    known = shards is not None or local_folder(recipe.model.place.address) is not None
    workers = jobs or cores()
    memory = build_memory(sizes, workers)
    encoding = memory + moment_bytes(sizes.config, workers)
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
        inline_sizes(sizes.config, USUAL_TOKENS, encoding),
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


def calibration_sizes(config: ModelConfig, tokens: int, down: DownForm) -> CalibrationSizes:
    """What a calibration on so many tokens takes, with down's moments kept in this form."""
    from ...formats.statistics.moment_file import layer_tensors

    h, i, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    stream = 4 * tokens * h
    attention = 2 * stream + 4 * tokens * (3 * config.q_dim + 2 * config.kv_dim)
    busiest = min(tokens, 8 * -(-tokens * config.num_experts_per_tok // e))
    expert = 4 * busiest * (2 * h + 3 * i) + 4 * 6 * h * i
    moments = 8 * 3 * (h * h + 2 * i * i) + 8 * CHUNK * max(h, i)
    dtype_bytes = {"F32": 4, "F16": 2, "I64": 8}
    layer = sum(
        dtype_bytes[dtype] * math.prod(shape) for dtype, shape in layer_tensors(config, down).values()
    )
    table = 8 * config.vocab_size * h
    running = stream + max(attention, 3 * stream + expert + moments) + layer
    memory = BASE_MEMORY + max(table + 2 * stream, running)
    return CalibrationSizes(tokens, memory, layer, layer * config.num_hidden_layers, stream)


def moment_bytes(config: ModelConfig, jobs: int) -> int:
    """Bytes of memory that rounding under full moments takes besides a build's own: of a layer, and of each worker."""
    return 8 * (4 * config.hidden_size**2 + jobs * 6 * config.intermediate_size**2)


def inline_sizes(config: ModelConfig, tokens: int, build_bytes: int = 0) -> InlineSizes:
    """What a build that calibrates itself takes, where its encoding alone takes `build_bytes` of memory.

    A layer is run and then encoded, never both at once. Full moments of one layer lie on the disk, with the residual
    streams before and after it.
    """
    sizes = calibration_sizes(config, tokens, "full")
    disk = sizes.layer_bytes + 2 * sizes.unfinished_bytes
    return InlineSizes(tokens, max(sizes.memory_bytes, build_bytes), disk)
