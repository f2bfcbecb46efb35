"""The engine's own quantiser: golden bytes for every format, and the edges at which it is easy to be almost right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mq_quant.formats.blocks import BY_NAME, Q8F16, LloydFormat
from mq_quant.lloyd.encode import encode_plain, encode_rotated
from mq_quant.lloyd.engine_quantiser import affine, q8, sort_group, truncate_f16

GOLDEN = np.load(Path(__file__).parents[1] / "golden/encode_vectors.npz")
ROTATED = {"mq4": "MQ4", "mq6": "MQ6", "mq2l": "MQ2-Lloyd", "mq3l": "MQ3-Lloyd"}


def slow_lloyd(group: np.ndarray, count: int) -> tuple[np.ndarray, list[int]]:
    """The text of the specification, value by value."""
    ordered = np.sort(group, kind="stable")
    centroids = [ordered[int(255 * (2 * k + 1) / (2 * count) + 0.5)] for k in range(count)]
    codes = [0] * 256
    if ordered[0] != ordered[-1]:
        for step in range(8):
            before = codes
            codes = [int(np.argmin([abs(v - c) for c in centroids])) for v in group]
            if step > 0 and codes == before:
                break
            for k in range(count):
                members = [float(v) for v, c in zip(group, codes, strict=True) if c == k]
                if members:
                    centroids[k] = np.float32(sum(members) / len(members))
    order = sorted(range(count), key=lambda k: (centroids[k], k))
    return np.float32(centroids)[order].astype(np.float16), [order.index(c) for c in codes]


@pytest.mark.parametrize("key", ROTATED)
def test_rotated_formats_bit_for_bit(key: str) -> None:
    payload = encode_rotated(GOLDEN["rotated"], BY_NAME[ROTATED[key]], "reference")
    assert payload.tobytes() == GOLDEN[key].tobytes()


def test_q8_bit_for_bit() -> None:
    assert encode_plain(GOLDEN["input"], Q8F16, "reference").tobytes() == GOLDEN["q8f16"].tobytes()


@pytest.mark.parametrize("key", ROTATED)
def test_groups_along_a_row_are_those_of_single_groups(key: str) -> None:
    fmt = BY_NAME[ROTATED[key]]
    wide = encode_rotated(GOLDEN["rotated"].reshape(20, 768), fmt, "reference")
    assert wide.tobytes() == GOLDEN[key].tobytes()


@pytest.mark.parametrize("name", ["MQ2-Lloyd", "MQ3-Lloyd"])
def test_lloyd_is_the_text(name: str) -> None:
    fmt = BY_NAME[name]
    assert isinstance(fmt, LloydFormat)
    random = np.random.default_rng(2)
    groups = np.concatenate(
        [
            random.standard_t(3, (4, 256)),
            random.integers(-2, 3, (3, 256)),
            random.choice([-0.0, 0.0], (1, 256)),
            np.full((1, 256), 0.3),
            np.where(np.arange(256) == 5, 3e4, random.standard_normal((1, 256))),
        ]
    ).astype(np.float32)
    codebook, codes = fmt.unpack(encode_rotated(groups, fmt, "reference"))
    for i, group in enumerate(groups):
        levels, wanted = slow_lloyd(group, fmt.levels)
        np.testing.assert_array_equal(codebook[i].view(np.uint16), levels.view(np.uint16), f"group {i}")
        assert codes[i].tolist() == wanted, f"group {i}"


def test_affine_spans_the_range() -> None:
    groups = np.random.default_rng(0).standard_normal((9, 256)).astype(np.float32)
    for count in (16, 64):
        scale, zero, codes = affine(groups, count)
        np.testing.assert_array_equal(zero, groups.min(axis=1))
        assert codes.min(axis=1).tolist() == [0] * 9
        assert codes.max(axis=1).tolist() == [count - 1] * 9
        back = zero[:, None] + scale[:, None] * codes
        assert (np.abs(back - groups) <= scale[:, None] * 0.5001).all()


def test_flat_groups_take_scale_one() -> None:
    for value in (0.0, -0.0, 7.0, 1e-40):
        scale, zero, codes = affine(np.full((2, 256), value, np.float32), 16)
        assert scale.tolist() == [1.0, 1.0] and not codes.any()
        np.testing.assert_array_equal(zero, np.float32([value, value]))


def test_q8_rounds_halves_away_from_zero() -> None:
    group = np.zeros((1, 32), np.float32)
    group[0, :6] = [127, 0.5, -0.5, 1.5, -2.5, -127]
    scale, codes = q8(group)
    assert scale.tolist() == [1.0]
    assert codes[0, :6].tolist() == [127, 1, -1, 2, -3, -127]


def test_q8_of_zeros_is_zero() -> None:
    scale, codes = q8(np.zeros((2, 32), np.float32))
    assert not codes.any() and scale.tolist() == [0.0, 0.0]


@given(st.floats(0, 2.0**127, width=32))
def test_truncation_never_rounds_up(value: float) -> None:
    low = truncate_f16(np.float32([value]))[0]
    assert np.isfinite(low)
    assert float(low) <= value
    above = np.float16([low]).view(np.uint16) + np.uint16(1)
    assert float(above.view(np.float16)[0]) > value


@pytest.mark.parametrize("key", ROTATED)
def test_a_group_that_repeats_is_fitted_afresh(key: str) -> None:
    """Codes left from an equal group before it are not taken for a finished first round."""
    fmt = BY_NAME[ROTATED[key]]
    twice = encode_rotated(np.tile(GOLDEN["rotated"], (1, 2)), fmt, "reference")
    want = np.tile(GOLDEN[key].reshape(len(GOLDEN["rotated"]), -1), (1, 2))
    np.testing.assert_array_equal(twice.reshape(want.shape), want)


@given(
    hnp.arrays(
        np.float32, 256, elements=st.floats(width=32, allow_nan=False), fill=st.floats(-1, 1, width=32)
    )
)
def test_the_sort_is_numpys(values: np.ndarray) -> None:
    want = np.sort(values)
    sort_group(values, np.empty(256, np.uint32), np.empty(256, np.uint32), np.empty((4, 256), np.int32))
    np.testing.assert_array_equal(values, want)


def test_the_sort_keeps_every_bit_pattern() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        bits = random.integers(0, 2**32, 256, dtype=np.uint32)
        bits[(bits & 0x7F800000) == 0x7F800000] = 0x80000000  # no NaN: negative zeros instead
        values = bits.view(np.float32).copy()
        sort_group(values, np.empty(256, np.uint32), np.empty(256, np.uint32), np.empty((4, 256), np.int32))
        assert (np.diff(values) >= 0).all()
        np.testing.assert_array_equal(np.sort(values.view(np.uint32)), np.sort(bits))
