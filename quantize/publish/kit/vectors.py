"""Single products of a kit: for each format and number of columns an input, a payload, and what comes out.

What each group of 256 columns adds is there too, so that the runner can say which columns a wrong result leaves out.
Inputs are rotated already: this is what a matrix-vector kernel sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ....formats.blocks import BY_NAME
from .weights import U8, draw, payload

ROWS = 16
COLUMNS = tuple(range(256, 3073, 256))
FORMATS = ("MQ4", "MQ6", "MQ2-Lloyd", "MQ3-Lloyd", "Q8F16")
KERNELS = {"gate-up": FORMATS[:4], "down": FORMATS[:4], "matvec": FORMATS[4:]}
"""The kernels of an engine that products are for, each with its formats: experts' gate and up, experts' down, and the
plain product of attention, router and lm_head."""


@dataclass(frozen=True)
class Vector:
    """One product: payload [ROWS, columns] times x f32 [columns]; `parts` f32 [ROWS, columns / 256] add up to it."""

    format: str
    columns: int
    payload: U8
    x: NDArray[np.float32]
    parts: NDArray[np.float32]


def vectors(formats: Sequence[str]) -> Iterator[Vector]:
    """Every product of these formats, format by format, the narrow ones first."""
    for name in formats:
        for columns in COLUMNS:
            yield vector(name, columns)


def vector(name: str, columns: int) -> Vector:
    """One product; sums are taken in f64."""
    label, fmt = f"vector {name} {columns}", BY_NAME[name]
    made = payload(label, fmt, ROWS, columns, columns**-0.5)
    raw = (draw(f"{label}/x", columns) & np.uint64(0xFFFF)).astype(np.float64)
    x = ((raw - 32768) / 16384).astype(np.float32)
    weights = fmt.decode(made).reshape(ROWS, columns).astype(np.float64)
    parts = (weights * x).reshape(ROWS, -1, 256).sum(-1)
    return Vector(name, columns, made, x, parts.astype(np.float32))
