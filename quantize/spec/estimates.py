"""What can be said about a build without reading a weight: the plan's summary and the table of tiers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...formats.machine import cores
from ...formats.minimax import ModelConfig, inventory, parse_config
from .calibration_plan import USUAL_TOKENS, estimate, inline_estimate, moment_bytes
from .metadata import template
from .places import ModelFiles, choose_recipe, local_folder, model_files
from .plan import Plan, make_plan, plan_tensors, summary
from .recipe import Recipe, load_tier
from .recipe import tiers as tier_names

MACHINES_GB = (16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256)
CONTEXT = 32768
HEADROOM_GB = 2.0


def offline_plan(recipe: Recipe, files: ModelFiles) -> Plan:
    """A plan from config and texts alone; what a build adds to the metadata changes its size by little."""
    config = parse_config(files.config)
    tensors = plan_tensors(recipe, config)
    metadata = template(files.config, files.side, config, tensors, {"recipe": recipe.resolved()})
    return make_plan(recipe, config, tensors, metadata)


def plan_summary(
    tier: str | None, path: Path | None, source: str | None, jobs: int | None, shard_cache: int = 2
) -> dict[str, Any]:
    """What `mq-quant plan` prints; `disk_bytes` is None where the number of shards to stream is not known."""
    recipe = choose_recipe(tier, path, source)
    files = model_files(recipe.model)
    plan = offline_plan(recipe, files)
    shards = recipe.model.place.shards
    streamed = shard_cache * -(-source_bytes(plan.config) // shards) if shards else 0
    known = shards is not None or local_folder(recipe.model.place.address) is not None
    workers, sizes = jobs or cores(), summary(plan, jobs or cores())
    encoding = sizes["peak_memory_bytes"] + moment_bytes(plan.config, workers)
    return {
        **sizes,
        "disk_bytes": plan.total_bytes + streamed if known else None,
        "calibration": {"tokens": USUAL_TOKENS, **estimate(plan.config, USUAL_TOKENS, "compact")},
        "calibrate_inline": {"tokens": USUAL_TOKENS, **inline_estimate(plan.config, USUAL_TOKENS, encoding)},
        "metadata_complete": files.complete,
    }


def source_bytes(config: ModelConfig) -> int:
    """Bytes of a released checkpoint's tensors: FP8 with f32 scales per block, BF16, F32."""
    rows, columns = config.block_shape
    total = 0
    for spec in inventory(config):
        total += math.prod(spec.shape) * {"fp8": 1, "bf16": 2, "f32": 4}[spec.stored]
        if spec.stored == "fp8":
            total += 4 * -(-spec.shape[0] // rows) * -(-spec.shape[1] // columns)
    return total


def kv_bytes(config: ModelConfig, positions: int) -> int:
    """Bytes of an f16 key/value cache of that many positions."""
    return positions * config.num_hidden_layers * 2 * config.kv_dim * 2


def machine_for(total_bytes: int, config: ModelConfig) -> str:
    """The smallest usual memory that holds the file, a 32k context and a little more."""
    need = (total_bytes + kv_bytes(config, CONTEXT)) / 1e9 + HEADROOM_GB
    return next((f"{size} GB" for size in MACHINES_GB if size >= need), f"{need:.0f} GB")


def tier_table(source: str | None) -> dict[str, Any]:
    """What `mq-quant tiers` prints, the largest tier first."""
    rows = []
    for tier in tier_names():
        recipe = choose_recipe(tier, None, source) if source else load_tier(tier)
        plan = offline_plan(recipe, model_files(recipe.model))
        rows.append(
            {
                "tier": tier,
                "total_bytes": plan.total_bytes,
                "memory": machine_for(plan.total_bytes, plan.config),
                "description": recipe.description,
            }
        )
    note = f"fits in: the file, a key/value cache of {CONTEXT} tokens, and {HEADROOM_GB:.0f} GB for the rest"
    return {"tiers": sorted(rows, key=lambda row: -int(row["total_bytes"])), "memory_note": note}
