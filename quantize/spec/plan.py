"""The plan: every tensor's format, size and place in the file, fixed from the config before a weight is read.

It follows from recipe and config alone. Formats that the engine cannot run are refused here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...formats.blocks import BY_NAME, Format
from ...formats.engine_facts import concerns
from ...formats.engine_rules import ONE_FORMAT, refused, uneven
from ...formats.errors import RecipeError, WeightError
from ...formats.hfq import TensorMeta, layout
from ...formats.minimax import PROJECTIONS, ModelConfig, TensorSpec, awq_scale_name, inventory
from ...formats.strictjson import dump_object
from .recipe import Recipe

SIDECAR = BY_NAME["F16"]
ROW_WEIGHTS = 1 << 24
"""Embeddings of more weights than this are encoded some rows at a time (64 MiB of f32)."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file; `start` counts from the first payload byte, `spec` is None for an AWQ sidecar."""

    name: str
    format: Format
    shape: tuple[int, ...]
    start: int
    nbytes: int
    layer: int | None
    spec: TensorSpec | None

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    def meta(self) -> TensorMeta:
        """The tensor's line in the file's index."""
        return TensorMeta(self.name, self.format.quant_type, self.shape, self.format.group_size, self.nbytes)


@dataclass(frozen=True)
class Plan:
    """The whole file; the metadata before `data_offset` has room for what is known only at the end."""

    recipe: Recipe
    config: ModelConfig
    tensors: tuple[PlannedTensor, ...]
    data_offset: int
    total_bytes: int
    metadata_bytes: int

    @property
    def payload_bytes(self) -> int:
        """The bytes of all tensors together."""
        return self.total_bytes - self.data_offset

    def digest(self) -> str:
        """A hash of every tensor's name, format, shape and place, and of the total size."""
        rows = [[t.name, t.format.quant_type, t.shape, t.start, t.nbytes] for t in self.tensors]
        return hashlib.sha256(json.dumps([rows, self.total_bytes]).encode()).hexdigest()


def check_format(recipe: Recipe, spec: TensorSpec, fmt: Format) -> None:
    """RecipeError where the engine cannot run a tensor in this format, WeightError where rows do not fill groups."""
    why = refused(spec, fmt.quant_type)
    if why:
        raise RecipeError(
            f"the recipe for {recipe.tier} gives it {fmt.name}",
            tensor=spec.name,
            hint=f"{why}; change its rule",
        )
    if spec.shape[-1] % fmt.group:
        raise WeightError(
            f"its rows of {spec.shape[-1]} weights do not fill groups of {fmt.group} in {fmt.name}",
            tensor=spec.name,
        )


def check_layers(recipe: Recipe, tensors: Iterable[tuple[TensorSpec, Format]]) -> None:
    """RecipeError where the gate and up matrices of a layer's experts, or their down matrices, differ in format."""
    for odd, model in uneven((spec, fmt.quant_type) for spec, fmt in tensors):
        formats = [recipe.format_of(spec.name).name for spec in (odd, model)]
        raise RecipeError(
            f"the recipe for {recipe.tier} gives it {formats[0]}, and {model.name} {formats[1]}",
            tensor=odd.name,
            hint=ONE_FORMAT,
        )


_Row = tuple[str, Format, tuple[int, ...], int | None, TensorSpec | None]


def _rows(recipe: Recipe, config: ModelConfig, scales: bool) -> Iterator[_Row]:
    """Every tensor in file order: the inventory, with each layer's AWQ sidecar before its first expert."""
    for spec in inventory(config):
        if scales and spec.role == "expert" and (spec.expert, spec.projection) == (0, PROJECTIONS[0]):
            assert spec.layer is not None
            yield awq_scale_name(spec.layer), SIDECAR, (config.hidden_size,), spec.layer, None
        fmt = recipe.format_of(spec.name)
        check_format(recipe, spec, fmt)
        yield spec.name, fmt, spec.shape, spec.layer, spec


def plan_tensors(recipe: Recipe, config: ModelConfig, scales: bool = True) -> tuple[PlannedTensor, ...]:
    """Every tensor of the file with its format, size and start; without `scales` no layer has an AWQ sidecar.

    Raises RecipeError where a format is one that the engine cannot run, WeightError where rows do not fill groups.
    """
    out: list[PlannedTensor] = []
    start = 0
    for name, fmt, shape, layer, spec in _rows(recipe, config, scales):
        out.append(PlannedTensor(name, fmt, shape, start, fmt.nbytes(math.prod(shape)), layer, spec))
        start += out[-1].nbytes
    check_layers(recipe, ((t.spec, t.format) for t in out if t.spec))
    return tuple(out)


def make_plan(
    recipe: Recipe, config: ModelConfig, tensors: tuple[PlannedTensor, ...], metadata: Mapping[str, Any]
) -> Plan:
    """Lay the file out; `metadata` must already have the length that it will have in the finished file."""
    laid = layout(metadata, [t.meta() for t in tensors])
    return Plan(recipe, config, tensors, laid.data_offset, laid.total_bytes, len(dump_object(metadata)))


def engine_warnings(plan: Plan) -> tuple[str, ...]:
    """What the engine does with the file of a plan that its user should know, and the way out: one sentence each."""
    experts = ((t.spec, t.format.quant_type) for t in plan.tensors if t.spec)
    return tuple(fact.warning for fact in concerns(experts))
