"""Sums over the tensors of a file, format by format, as plan, inspect and verify show them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..blocks import FORMATS
from .layout import TensorMeta


@dataclass(frozen=True)
class FormatTotals:
    """All tensors of one format together; `bytes` counts their payloads."""

    tensors: int = 0
    weights: int = 0
    bytes: int = 0

    def plus(self, tensors: int, weights: int, nbytes: int) -> FormatTotals:
        return FormatTotals(self.tensors + tensors, self.weights + weights, self.bytes + nbytes)

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def format_name(quant_type: int) -> str:
    """The name of a block format; `type N` for numbers that are none of ours."""
    return FORMATS[quant_type].name if quant_type in FORMATS else f"type {quant_type}"


def by_format(tensors: Iterable[TensorMeta]) -> dict[str, FormatTotals]:
    """{format name: totals} in the order in which the formats first appear."""
    out: dict[str, FormatTotals] = {}
    for t in tensors:
        name = format_name(t.quant_type)
        out[name] = out.get(name, FormatTotals()).plus(1, math.prod(t.shape), t.nbytes)
    return out
