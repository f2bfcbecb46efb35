"""The tensors of a file counted by kind, so that its sizes are known without a list of 48 000 of them.

The rules of a recipe match names, so every name is still held against the rules; but a layer whose tensors fall to the
same rules as those of the layer before is not counted again. The bundled tiers of a model share their patterns, so one
count serves all of them. The sizes are exactly those that `plan.make_plan` gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ...formats.blocks import Format
from ...formats.engine_facts import EngineFact, concerns
from ...formats.hfq.layout import ALIGNMENT, METADATA_OFFSET, SMALLEST_ENTRY
from ...formats.hfq.totals import FormatTotals
from ...formats.minimax import (
    ModelConfig,
    TensorSpec,
    awq_scale_name,
    inventory,
    layer_inventory,
    layer_prefix,
)
from ...formats.strictjson import compact
from .metadata import Totals, template
from .patterns import matcher
from .places import ModelFiles
from .plan import SIDECAR, check_format, check_layers
from .recipe import Recipe

_COUNT_BYTES = 4
_DIMENSION_BYTES = 4
"""What the index holds besides its lines' fixed part: the number of tensors, and each dimension of a shape."""


@dataclass(frozen=True)
class Kind:
    """`count` tensors of one layer that agree in role, shape and rule; `first` is the first of them in the file.

    `rule` is None where no rule of the recipe matches. `index_bytes` is what their lines take in the file's index.
    """

    first: TensorSpec
    rule: int | None
    count: int
    index_bytes: int


@dataclass(frozen=True)
class FileSizes:
    """Sizes of a file before it is built; `largest` is the number of weights in its largest tensor, and
    `concerns` is what the engine does with its experts.
    """

    config: ModelConfig
    total_bytes: int
    payload_bytes: int
    metadata_bytes: int
    tensor_count: int
    by_format: Mapping[str, FormatTotals]
    largest: int
    concerns: tuple[EngineFact, ...]


def file_sizes(recipe: Recipe, files: ModelFiles, config: ModelConfig, unknown: int = 0) -> FileSizes:
    """The sizes that a file of this recipe will have; `config` is that of `files`, parsed. `unknown` bytes are counted
    for metadata that are known only once the source is open.

    Raises RecipeError where a format is one that the engine cannot run, WeightError where rows do not fill groups.
    """
    found = kinds(tuple(rule.tensors for rule in recipe.rules), config)
    formats = [recipe.format_of(kind.first.name) for kind in found]
    for kind, fmt in zip(found, formats, strict=True):
        check_format(recipe, kind.first, fmt)
    check_layers(recipe, zip((kind.first for kind in found), formats, strict=True))
    totals, sums = _totals(config, found, formats)
    metadata = template(files.config, files.side, config, totals, {"recipe": recipe.resolved()})
    metadata_bytes = len(compact(metadata)) + unknown
    index = _COUNT_BYTES + sum(kind.index_bytes for kind in found)
    index += sum(_line(awq_scale_name(layer), 1) for layer in range(config.num_hidden_layers))
    data_offset = -(-(METADATA_OFFSET + metadata_bytes + index) // ALIGNMENT) * ALIGNMENT
    return FileSizes(
        config,
        data_offset + totals.payload_bytes,
        totals.payload_bytes,
        metadata_bytes,
        totals.tensors,
        sums,
        max(math.prod(kind.first.shape) for kind in found),
        concerns((kind.first, fmt.quant_type) for kind, fmt in zip(found, formats, strict=True)),
    )


@lru_cache(maxsize=4)
def kinds(patterns: tuple[str, ...], config: ModelConfig) -> tuple[Kind, ...]:
    """The inventory of a model in file order, grouped by layer, role, shape and the first pattern that matches."""
    embeddings, *last = inventory(replace(config, num_hidden_layers=0))
    specs = list(layer_inventory(config, 0))
    tails = [spec.name.removeprefix(layer_prefix(0)) for spec in specs]
    out = [_single(embeddings, patterns)]
    rules: list[int | None] = []
    groups: list[tuple[int, int, int]] = []
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        found = _rules(patterns, [prefix + tail for tail in tails])
        if found != rules:
            rules, groups = found, _grouped(specs, tails, found)
        for first, count, tail_bytes in groups:
            spec = replace(specs[first], name=prefix + tails[first], layer=layer)
            out.append(Kind(spec, rules[first], count, tail_bytes + count * len(prefix)))
    return (*out, *(_single(spec, patterns) for spec in last))


def _rules(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name the number of the first pattern that it holds, None where it holds none."""
    found: list[int | None] = [None] * len(names)
    rest = list(range(len(names)))
    for rule, pattern in enumerate(patterns):
        matches = matcher(pattern)
        matching = [matches(names[i]) for i in rest]
        for i, match in zip(rest, matching, strict=True):
            if match:
                found[i] = rule
        rest = [i for i, match in zip(rest, matching, strict=True) if not match]
    return found


def _grouped(
    specs: Sequence[TensorSpec], tails: Sequence[str], rules: Sequence[int | None]
) -> list[tuple[int, int, int]]:
    """(place of the first, count, bytes of their index lines without the layer's prefix) of each kind in a layer."""
    groups: dict[tuple[object, ...], tuple[int, int, int]] = {}
    for i, (spec, tail, rule) in enumerate(zip(specs, tails, rules, strict=True)):
        key = (spec.role, spec.projection == "w2", spec.shape, rule)
        first, count, size = groups.get(key, (i, 0, 0))
        groups[key] = (first, count + 1, size + _line(tail, len(spec.shape)))
    return list(groups.values())


def _single(spec: TensorSpec, patterns: Sequence[str]) -> Kind:
    return Kind(spec, _rules(patterns, [spec.name])[0], 1, _line(spec.name, len(spec.shape)))


def _line(name: str, dimensions: int) -> int:
    """Bytes of a tensor's line in the index."""
    return SMALLEST_ENTRY + len(name) + _DIMENSION_BYTES * dimensions


def _totals(
    config: ModelConfig, found: Sequence[Kind], formats: Sequence[Format]
) -> tuple[Totals, dict[str, FormatTotals]]:
    """All tensors together, AWQ scales included, and format by format in the order of the file."""
    sums: dict[str, list[int]] = {}
    """{format name: [tensors, weights, bytes]}"""

    def add(fmt: Format, count: int, weights: int) -> None:
        row = sums.setdefault(fmt.name, [0, 0, 0])
        for i, each in enumerate((1, weights, fmt.nbytes(weights))):
            row[i] += count * each

    weights = experts = quantised = 0
    scales_counted = False
    for kind, fmt in zip(found, formats, strict=True):
        size = math.prod(kind.first.shape)
        if kind.first.role == "expert" and not scales_counted:
            add(SIDECAR, config.num_hidden_layers, config.hidden_size)
            scales_counted = True
        add(fmt, kind.count, size)
        weights += kind.count * size
        experts += kind.count * size if kind.first.role == "expert" else 0
        quantised += kind.count * size if fmt.group > 1 else 0
    totals = {name: FormatTotals(*row) for name, row in sums.items()}
    tensors = sum(row.tensors for row in totals.values())
    payload = sum(row.bytes for row in totals.values())
    return Totals(tensors, payload, weights, experts, quantised), totals
