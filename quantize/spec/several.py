"""What building several tiers in one pass takes, before the work: as `estimates` says it of one tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...formats.machine import cores
from ...formats.minimax import expert_name
from .efforts import EffortCost, Share
from .estimates import TierTable, costs, sized, streamed_bytes, table_of
from .recipe import Recipe


@dataclass(frozen=True)
class SeveralPlan:
    """The sizes of the tiers, what their files take together, and what each effort takes for all of them: hours of one
    pass, one download. `disk_bytes` counts the files and the shards that are streamed; it is None where nobody has said
    how many shards the repository has.
    """

    model: str
    table: TierTable
    total_bytes: int
    disk_bytes: int | None
    efforts: tuple[EffortCost, ...]
    device: str
    jobs: int

    def as_json(self) -> dict[str, Any]:
        mine = {key: value for key, value in asdict(self).items() if key != "table"}
        return {**mine, **self.table.as_json()}


def several_plan(
    tiers: Sequence[str], source: str | None, jobs: int | None, shard_cache: int = 2, device: str = "cpu"
) -> SeveralPlan:
    """The plan of bundled tiers for the released model, or for another source; RecipeError for an unknown tier."""
    rows, workers = [sized(tier, source) for tier in tiers], jobs or cores()
    recipe, sizes = rows[0]
    total = sum(each.total_bytes for _, each in rows)
    streamed = streamed_bytes(recipe.model, sizes.config, shard_cache)
    share = Share.of([_formats(each, sizes.config.num_hidden_layers) for each, _ in rows])
    efforts = costs(recipe, sizes, workers, device, share)
    disk = None if streamed is None else total + streamed
    return SeveralPlan(recipe.model.name, table_of(rows), total, disk, efforts, device, workers)


def _formats(recipe: Recipe, layers: int) -> list[tuple[str, str]]:
    """In what gate and up, and down, are stored, layer by layer."""

    def name(layer: int, projection: str) -> str:
        return recipe.format_of(expert_name(layer, 0, projection)).name

    return [(name(layer, "w1"), name(layer, "w2")) for layer in range(layers)]
