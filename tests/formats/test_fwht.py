"""The rotation: against a matrix built from its definition, bit for bit against the golden vectors, and its algebra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mq_quant.formats.errors import WeightError
from mq_quant.formats.fwht import SIGNS1, SIGNS2, rotate, rotate_columns, rotate_rows, unrotate
from rotation import matrix

GOLDEN = np.load(Path(__file__).parents[1] / "golden/encode_vectors.npz")
GROUPS = hnp.arrays(
    np.float32, (1, 512), elements=st.floats(-1e6, 1e6, width=32), fill=st.floats(-1e6, 1e6, width=32)
)


def generator_signs(seed: int) -> list[float]:
    state, out = seed, []
    for _ in range(256):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        out.append(1.0 if state & 0x10000 else -1.0)
    return out


def definition() -> np.ndarray:
    """S2 · H · S1 / 16 with H_ij = (-1)^(number of common one bits of i and j)."""
    h = np.array([[1.0 - 2.0 * ((i & j).bit_count() & 1) for j in range(256)] for i in range(256)])
    return np.diag(generator_signs(1042)) @ h @ np.diag(generator_signs(42)) / 16


R = definition()


@pytest.mark.parametrize("shape", [(255,), (2, 128), (512, 1), (3, 100), (257,), ()])
def test_a_last_axis_that_is_no_multiple_of_256_is_refused(shape: tuple[int, ...]) -> None:
    """[2, 128] holds 256 values too, but a group may not cross a row."""
    for turn in (rotate, unrotate):
        with pytest.raises(WeightError, match="multiple of 256"):
            turn(np.zeros(shape, np.float32))


def test_signs_are_the_generators() -> None:
    assert SIGNS1.tolist() == generator_signs(42)
    assert SIGNS2.tolist() == generator_signs(1042)
    assert SIGNS1.dtype == SIGNS2.dtype == np.float32


def test_the_matrix_is_the_definition_and_orthonormal() -> None:
    r = matrix()
    np.testing.assert_array_equal(r, R)
    np.testing.assert_array_equal(r @ r.T, np.eye(256))
    np.testing.assert_array_equal(np.square(r), np.full((256, 256), 1 / 256))


def test_golden_vectors_bit_for_bit() -> None:
    np.testing.assert_array_equal(rotate(GOLDEN["input"]).view(np.uint32), GOLDEN["rotated"].view(np.uint32))


@given(GROUPS)
def test_rotate_is_the_matrix_group_by_group(x: np.ndarray) -> None:
    wide = x.astype(np.float64).reshape(-1, 256) @ R.T
    scale = np.abs(x).max() + 1e-30
    np.testing.assert_allclose(rotate(x).reshape(-1, 256), wide, atol=scale * 2e-5, rtol=0)


@given(GROUPS)
def test_unrotate_undoes_rotate_and_lengths_are_kept(x: np.ndarray) -> None:
    y = rotate(x)
    scale = np.abs(x).max() + 1e-30
    np.testing.assert_allclose(unrotate(y), x, atol=scale * 1e-5, rtol=0)
    np.testing.assert_allclose(rotate(unrotate(x)), x, atol=scale * 1e-5, rtol=0)
    length = np.linalg.norm(x.astype(np.float64))
    assert np.linalg.norm(y.astype(np.float64)) == pytest.approx(length, rel=1e-5, abs=1e-30)


def test_inner_products_are_kept() -> None:
    """What makes the format work: rotated weights times rotated inputs are the output."""
    random = np.random.default_rng(0)
    w, x = random.standard_normal((2, 1024)).astype(np.float32)
    assert rotate(w) @ rotate(x) == pytest.approx(w @ x, abs=1e-3)


def test_input_is_left_alone_and_any_layout_is_read() -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((4, 512)).astype(np.float32)
    before = x.copy()
    want = rotate(x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(rotate(np.asfortranarray(x)), want)
    np.testing.assert_array_equal(rotate(np.repeat(x, 2, axis=0)[::2]), want)
    np.testing.assert_array_equal(rotate(x.reshape(2, 2, 512)).reshape(4, 512), want)
    np.testing.assert_array_equal(rotate(x[1]), want[1])
    assert rotate(np.empty((0, 256), np.float32)).shape == (0, 256)
    x.flags.writeable = False
    np.testing.assert_array_equal(rotate(x), want)


def test_a_moment_is_rotated_on_both_sides() -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((40, 512))
    moment = x.T @ x
    both, got = np.kron(np.eye(2), R), moment.copy()
    rotate_rows(got)
    rotate_columns(got)
    np.testing.assert_allclose(got, both @ moment @ both.T, atol=1e-12 * np.abs(moment).max(), rtol=0)
