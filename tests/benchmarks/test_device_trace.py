"""The shares of time in which kernels ran, from when each began and ended."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from device_trace import BIN, Kernels, draw


def test_shares_count_overlapping_kernels_once() -> None:
    spans = np.array([(0.0, 1.0), (0.5, 0.75), (1.5, 2.0)]) * BIN
    kernels = Kernels(spans[:, 0], spans[:, 1])
    np.testing.assert_allclose(kernels.running(1), [1.0, 0.5], atol=1e-9)
    np.testing.assert_allclose(kernels.running(2), [0.25, 0.0], atol=1e-9)


def test_the_picture_has_a_row_for_each_gpu(tmp_path: Path) -> None:
    kernels = Kernels(np.array([0.0, 0.1]), np.array([0.05, 0.2]))
    assert draw({0: kernels, 1: kernels}, "two", tmp_path / "out.png") == pytest.approx(0.75)
    assert (tmp_path / "out.png").stat().st_size > 1000
