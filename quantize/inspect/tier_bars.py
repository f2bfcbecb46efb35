"""The bars that `verify` holds a file to where no recipe is given: those of its tier, or of the tier below it."""

from __future__ import annotations

from collections import defaultdict

from ...formats.blocks import FORMATS
from ...formats.hfq import HfqFile
from ...formats.hfq.provenance import RecipeRecord
from ...formats.minimax import PROJECTIONS, expert_name, expert_of
from ...verify.bars import Bars
from ..spec.places import TINY
from ..spec.recipe import DEFAULT_MODEL, fitted_tiers, load_tier, tiers


def bars_of(file: HfqFile, built_with: RecipeRecord | None) -> Bars:
    """The bars of the bundled tier that a file was built as. A file of a recipe of one's own, such as one that was
    fitted to a size, has those of the largest tier whose formats are nowhere larger than its own. None for files of
    other programs.
    """
    if built_with is None or built_with.tier is None:
        return Bars()
    model = TINY if built_with.model == TINY else DEFAULT_MODEL
    if built_with.tier in (*tiers(model), *fitted_tiers(model)):
        return load_tier(built_with.tier, model).verify
    least = _smallest_groups(file)
    below = [
        name for name in tiers(model) if all(n <= least.get(p, 0) for p, n in _groups(name, model).items())
    ]
    largest = max(below, key=lambda name: sum(_groups(name, model).values()), default=None)
    return load_tier(largest, model).verify if largest else Bars()


def _smallest_groups(file: HfqFile) -> dict[str, int]:
    """Of each projection of experts, the bytes of a group in the smallest format that any layer has."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for entry in file.entries:
        place, fmt = expert_of(entry.name), FORMATS.get(entry.quant_type)
        if place and fmt:
            found[place[2]].add(fmt.group_bytes)
    return {projection: min(sizes) for projection, sizes in found.items()}


def _groups(tier: str, model: str) -> dict[str, int]:
    """Of each projection, the bytes of a group in a tier's format."""
    recipe = load_tier(tier, model)
    return {p: recipe.format_of(expert_name(0, 0, p)).group_bytes for p in PROJECTIONS}
