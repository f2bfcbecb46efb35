"""How the encoder's launches are cut into blocks, and `encode_constants.h`, the header that tells the kernels.

The header also holds the numbers of lloyd/constants.py that the kernels compute with.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...formats.blocks import AffineFormat, Format
from ...lloyd import constants
from ..runtime.block_table import WAVE, Number, declare

TILE = 32
"""Rows of a tile: lane t of the one wave has row t."""
PANEL = 8
"""Columns of a matrix that a wave holds at a time."""
PRODUCT_SIDE = 64
"""Rows, and columns, of a tile of a product, by a block of as many threads."""
PRODUCT_DEPTH = 16
"""Elements of its sums that a block holds at a time."""
KMEANS_ROWS = 8
"""Rows of a block of the k-means kernels, a wave each."""
DESCENT_WAVES = 4
"""Rows of a block of the descent, a wave each."""
GRID_WAVES = 8
"""Rows of a block of the refits of a grid, a wave each; a codebook's are fewer, the more levels it has."""
BOOK_WAVES = 4
"""Rows of a block of the dense refit of a codebook, a wave each."""
STRIP = 8
"""Rows of a Hessian's factor that a block works on at a time."""

CONSTANTS: Mapping[str, Number] = {
    "TILE": TILE,
    "PANEL": PANEL,
    "PRODUCT_ROWS": PRODUCT_SIDE,
    "PRODUCT_COLUMNS": PRODUCT_SIDE,
    "PRODUCT_THREADS": PRODUCT_SIDE,
    "PRODUCT_DEPTH": PRODUCT_DEPTH,
    "KMEANS_ROWS": KMEANS_ROWS,
    "KMEANS_THREADS": KMEANS_ROWS * WAVE,
    "DESCENT_WAVES": DESCENT_WAVES,
    "DESCENT_THREADS": DESCENT_WAVES * WAVE,
    "GRID_WAVES": GRID_WAVES,
    "REFIT_THREADS": GRID_WAVES * WAVE,
    "BOOK_WAVES": BOOK_WAVES,
    "STRIP": STRIP,
    **{
        name: getattr(constants, name)
        for name in (
            *("MOST_ENERGY", "SIGNAL_FLOOR", "RIDGE", "PIVOT_FLOOR", "POSED_FLOOR"),
            *("DETERMINANT_FLOOR", "ROUNDER", "SMALLEST_SCALE"),
            *("LLOYD_STEPS", "PAIR_SWEEPS", "BOUND_SLACK"),
        )
    },
    "HALF_MAX": np.float32(constants.F16_MAX),
}


def refit_waves(fmt: Format) -> int:
    """Rows of a block of the refits, a wave each: WAVES in encode_fit.hip."""
    return GRID_WAVES if isinstance(fmt, AffineFormat) else WAVE // fmt.levels


def dense_waves(fmt: Format) -> int:
    """Rows of a block of the dense refits, a wave each: DENSE_WAVES in encode_fit.hip."""
    return GRID_WAVES if isinstance(fmt, AffineFormat) else BOOK_WAVES


def header() -> str:
    """The text of `encode_constants.h`."""
    return declare(CONSTANTS)
