"""An allocation: the format of gate and up and that of down, layer by layer; and the rules of a recipe that say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...formats.minimax import ModelConfig, expert_name
from ..spec.recipe import Recipe, Rule
from .measurement import PROJECTIONS, Projection

_MATRICES = {"gate_up": "w[13]", "down": "w2"}
_FIRST = {"gate_up": "w1", "down": "w2"}
LAYERS_IN_RULE = 64
"""Layers that one rule lists: patterns have a limit, and a line should be readable."""


@dataclass(frozen=True)
class Allocation:
    """The names of the formats (gate and up, down) of each layer's experts."""

    layers: tuple[tuple[str, str], ...]

    def pieces(self) -> Iterator[tuple[int, Projection, str]]:
        """Every piece and its format, in the order of a measurement."""
        for layer, formats in enumerate(self.layers):
            for projection, name in zip(PROJECTIONS, formats, strict=True):
                yield layer, projection, name

    def of(self, projection: Projection) -> tuple[str, ...]:
        """The format of one projection in every layer."""
        return tuple(formats[PROJECTIONS.index(projection)] for formats in self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same formats."""
        return len(set(self.layers)) == 1


def allocation_of(recipe: Recipe, config: ModelConfig) -> Allocation:
    """The formats that a recipe gives to the experts of each layer."""
    return Allocation(
        tuple(
            (
                recipe.format_of(expert_name(layer, 0, _FIRST["gate_up"])).name,
                recipe.format_of(expert_name(layer, 0, _FIRST["down"])).name,
            )
            for layer in range(config.num_hidden_layers)
        )
    )


def rules_of(allocation: Allocation, base: Recipe) -> tuple[Rule, ...]:
    """The rules of an allocation, and those of `base` for all tensors outside the experts.

    A projection's most frequent format needs no list of layers, so that an allocation with the same formats in all
    layers has the rules of a tier.
    """
    rest = tuple(rule for rule in base.rules if "experts" not in rule.tensors)
    return (*_expert_rules(allocation, "gate_up"), *_expert_rules(allocation, "down"), *rest)


def _expert_rules(allocation: Allocation, projection: Projection) -> Iterator[Rule]:
    formats = allocation.of(projection)
    (usual, _), *others = Counter(formats).most_common()
    matrices = _MATRICES[projection]
    for name in sorted(name for name, _ in others):
        layers = [str(layer) for layer, found in enumerate(formats) if found == name]
        for some in _cut(layers):
            yield Rule(
                tensors=rf"\.layers\.({'|'.join(some)})\..*\.experts\.\d+\.{matrices}\.weight$", format=name
            )
    yield Rule(tensors=rf"\.experts\.\d+\.{matrices}\.weight$", format=usual)


def _cut(layers: Sequence[str]) -> Iterator[Sequence[str]]:
    for low in range(0, len(layers), LAYERS_IN_RULE):
        yield layers[low : low + LAYERS_IN_RULE]
