"""Sixteen rotated groups with a Hessian and initial levels, as the compiled kernels take them: row index last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mq_quant.formats.fwht import rotate
from mq_quant.lloyd.constants import GRID_STEPS
from mq_quant.lloyd.hessian.group import GroupHessian, from_diagonal
from mq_quant.lloyd.levels.affine import affine_rows
from mq_quant.lloyd.levels.kmeans import kmeans_rows

LANES = 16
EMPTY = np.empty(0, np.float32)
NO_CODES = np.empty((0, 256), np.uint8)


def heavy_rows(count: int, width: int = 256, seed: int = 0) -> np.ndarray:
    """Rotated heavy-tailed rows f32 [count, width]."""
    return rotate(np.random.default_rng(seed).standard_t(4, (count, width)).astype(np.float32))


def unequal_weights(sigma: float, seed: int = 0, width: int = 256) -> np.ndarray:
    """Channel weights f64 whose square roots deviate by `sigma` in the logarithm, damped."""
    d = np.exp(np.random.default_rng(1000 + seed).normal(0, 2 * sigma, width))
    return 0.95 * d + 0.05 * d.mean()


@dataclass
class Problem:
    """y f32 [256, 16], the Hessian and its f64 matrix, ascending levels f32 [K, 16] and their midpoints."""

    y: np.ndarray
    h: GroupHessian
    h64: np.ndarray
    levels: np.ndarray

    @property
    def mids(self) -> np.ndarray:
        return np.ascontiguousarray(np.float32(0.5) * (self.levels[:-1] + self.levels[1:]))

    def nearest(self) -> np.ndarray:
        """Codes f32 [256, 16] of the nearest level, the lower one where two are."""
        return np.float32((self.y[:, None, :] > self.mids[None, :, :]).sum(axis=1))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """f64 [256, 16]."""
        return np.take_along_axis(self.levels, codes.astype(np.int64), axis=0).astype(np.float64)

    def energy(self, codes: np.ndarray) -> np.ndarray:
        """E(q) per lane, f64 [16]."""
        e = self.y - self.decode(codes)
        return np.einsum("ir,ij,jr->r", e, self.h64, e)


def problem(count: int, sigma: float, seed: int = 0, grid: bool = False) -> Problem:
    rows = heavy_rows(LANES, seed=seed)
    h = from_diagonal(unequal_weights(sigma, seed))
    if grid:
        params = np.empty((LANES, 2), np.float32)
        affine_rows(rows, 0, count, GRID_STEPS, params, NO_CODES)
        levels = params[:, :1] + params[:, 1:] * np.arange(count, dtype=np.float32)
    else:
        levels = np.empty((LANES, count), np.float32)
        kmeans_rows(rows, 0, False, levels)
    lanes = np.ascontiguousarray(rows.T)
    return Problem(lanes, h, h.matrix.astype(np.float64), np.ascontiguousarray(levels.T))
