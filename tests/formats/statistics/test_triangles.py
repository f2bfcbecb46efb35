"""Triangles become whole matrices, whatever their width and wherever they were read from."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.statistics.moment_file import triangle
from mq_quant.formats.statistics.triangles import ROWS, unpack_moment


@pytest.mark.parametrize("width", [0, 1, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS + 3])
@pytest.mark.parametrize("kind", ["<f4", "<f2"])
def test_a_triangle_becomes_both_halves(width: int, kind: str) -> None:
    values = np.random.default_rng(width).standard_normal(triangle(width)).astype(kind)
    want = np.zeros((width, width))
    want[np.triu_indices(width)] = want.T[np.triu_indices(width)] = values
    read = np.frombuffer(values.tobytes(), kind)  # as from a file: it cannot be written to
    for packed in (values, read, np.repeat(values, 2)[::2]):
        np.testing.assert_array_equal(unpack_moment(packed, width), want)


def test_nothing_beyond_a_triangle_is_read() -> None:
    with pytest.raises(AssertionError):
        unpack_moment(np.zeros(9, np.float32), 4)
