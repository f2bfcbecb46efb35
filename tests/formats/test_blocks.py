"""Block formats, read as the specification: sizes, a decoder of Python integers, golden bytes, any code anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mq_quant.formats.blocks import (
    BY_NAME,
    F16_FORMAT,
    F32_FORMAT,
    FORMATS,
    MQ2_LLOYD,
    Q8F16,
    AffineFormat,
    Format,
    LloydFormat,
    pack_bits,
    unpack_bits,
)
from mq_quant.formats.errors import HfqError, MqError, WeightError

GOLDEN = np.load(Path(__file__).parents[1] / "golden/encode_vectors.npz")
SPECIFICATION = {  # quant_type: name, group_size field, weights and bytes per group, codes, rotated
    1: ("F16", 0, 1, 2, 0, False),
    2: ("F32", 0, 1, 4, 0, False),
    3: ("Q8F16", 32, 32, 34, 256, False),
    13: ("MQ4", 256, 256, 136, 16, True),
    15: ("MQ6", 256, 256, 200, 64, True),
    19: ("MQ2-Lloyd", 256, 256, 72, 4, True),
    20: ("MQ3-Lloyd", 256, 256, 112, 8, True),
    30: ("MQ4-Lloyd", 256, 256, 160, 16, True),
}
KEYS = {
    "q8f16": "Q8F16",
    "mq4": "MQ4",
    "mq6": "MQ6",
    "mq2l": "MQ2-Lloyd",
    "mq3l": "MQ3-Lloyd",
    "mq4l": "MQ4-Lloyd",
}
EXPECTED_DB = {"q8f16": 40, "mq4": 18, "mq6": 30, "mq2l": 8, "mq3l": 13, "mq4l": 17}


def code(stream: bytes, bits: int, index: int) -> int:
    """Code `index` of a stream whose first bit is the lowest bit of its first byte."""
    return int.from_bytes(stream, "little") >> (bits * index) & ((1 << bits) - 1)


def slow_decode(name: str, group: bytes) -> list[float]:
    """One group as f32 values, from the text of the specification."""
    if name == "Q8F16":
        scale = np.frombuffer(group[:2], "<f2")[0].astype(np.float32)
        return [scale * np.float32(b - 256 if b > 127 else b) for b in group[2:]]
    if name in ("MQ4", "MQ6"):
        scale, zero = np.frombuffer(group[:8], "<f4")
        bits = int(name[2])
        return [zero + scale * np.float32(code(group[8:], bits, i)) for i in range(256)]
    bits = int(name[2])
    levels = np.frombuffer(group[: 2 << bits], "<f2").astype(np.float32)
    return [levels[code(group[2 << bits :], bits, i)] for i in range(256)]


def codes_of(bits: int) -> st.SearchStrategy[np.ndarray]:
    """u8 [0 to 3, 256] of any codes."""
    raw = st.integers(0, 3).flatmap(lambda n: st.binary(min_size=256 * n, max_size=256 * n))
    return raw.map(lambda b: np.frombuffer(b, np.uint8).reshape(-1, 256) & np.uint8((1 << bits) - 1))


def test_the_table_is_the_specifications() -> None:
    found = {
        t: (f.name, f.group_size, f.group, f.group_bytes, f.levels, f.rotated) for t, f in FORMATS.items()
    }
    assert found == SPECIFICATION
    assert set(BY_NAME) == {row[0] for row in SPECIFICATION.values()}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_payloads_of_a_wrong_length_are_refused(fmt: Format) -> None:
    for wrong in (1, fmt.group_bytes - 1, fmt.group_bytes + 1):
        with pytest.raises(HfqError, match=fmt.name):
            fmt.decode(bytes(wrong))
    if fmt.group > 1:
        with pytest.raises(HfqError, match=f"groups of {fmt.group}"):
            fmt.nbytes(fmt.group + 1)
    assert fmt.nbytes(3 * fmt.group) == 3 * fmt.group_bytes
    assert fmt.decode(b"").shape == (0, fmt.group)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@given(st.data())
def test_any_bytes_decode_the_same_from_any_container(fmt: Format, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=2 * fmt.group_bytes, max_size=2 * fmt.group_bytes))
    with np.errstate(all="ignore"):
        want = fmt.decode(raw)
        assert want.dtype == np.float32 and want.shape == (2, fmt.group)
        np.testing.assert_array_equal(fmt.decode(np.frombuffer(raw, np.uint8)), want)
        np.testing.assert_array_equal(fmt.decode(memoryview(bytearray(raw))), want)


@pytest.mark.parametrize("key", KEYS)
def test_golden_blocks_decode_as_the_text_says(key: str) -> None:
    fmt, payload = BY_NAME[KEYS[key]], GOLDEN[key]
    groups = payload.reshape(-1, fmt.group_bytes)
    want = np.array([slow_decode(fmt.name, bytes(g)) for g in groups], np.float32)
    np.testing.assert_array_equal(fmt.decode(payload).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("key", KEYS)
def test_golden_blocks_are_close_to_what_was_encoded(key: str) -> None:
    fmt = BY_NAME[KEYS[key]]
    true = GOLDEN["rotated" if fmt.rotated else "input"].astype(np.float64)
    plain = np.abs(true).max(axis=1) < 60000  # levels of larger blocks do not fit f16
    error = true - fmt.decode(GOLDEN[key]).reshape(true.shape)
    ratio = np.square(error[plain]).sum(axis=1) / np.maximum(np.square(true[plain]).sum(axis=1), 1e-20)
    assert np.median(ratio) < 10 ** (-EXPECTED_DB[key] / 10)


@pytest.mark.parametrize("key", KEYS)
def test_golden_blocks_survive_unpack_and_pack(key: str) -> None:
    fmt = BY_NAME[KEYS[key]]
    assert isinstance(fmt, AffineFormat | LloydFormat | type(Q8F16))
    packed = fmt.pack(*fmt.unpack(GOLDEN[key]))
    assert packed.tobytes() == GOLDEN[key].tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@given(st.data())
def test_codes_sit_where_the_stream_says(bits: int, data: st.DataObject) -> None:
    codes = data.draw(codes_of(bits))
    stream = pack_bits(codes, bits)
    assert stream.dtype == np.uint8 and stream.shape == (len(codes), 32 * bits)
    for row, packed in zip(codes, stream, strict=True):
        assert int.from_bytes(bytes(packed), "little") == sum(int(c) << (bits * i) for i, c in enumerate(row))
    np.testing.assert_array_equal(unpack_bits(stream, bits), codes)


@pytest.mark.parametrize("name", ["MQ2-Lloyd", "MQ3-Lloyd", "MQ4-Lloyd"])
@given(st.data())
def test_lloyd_blocks_round_trip(name: str, data: st.DataObject) -> None:
    fmt = BY_NAME[name]
    assert isinstance(fmt, LloydFormat)
    codes = data.draw(codes_of(fmt.bits))
    size = (len(codes), fmt.levels)
    codebook = data.draw(hnp.arrays(np.float16, size, elements=st.floats(-6e4, 6e4, width=16)))
    payload = fmt.pack(codebook, codes)
    assert payload.shape == (len(codes), fmt.group_bytes)
    again, codes_again = fmt.unpack(payload)
    np.testing.assert_array_equal(again.view(np.uint16), codebook.view(np.uint16))
    np.testing.assert_array_equal(codes_again, codes)
    want = np.take_along_axis(codebook, codes.astype(int), 1).astype(np.float32)
    np.testing.assert_array_equal(fmt.decode(payload), want)


@pytest.mark.parametrize("name", ["MQ4", "MQ6"])
@given(st.data())
def test_affine_blocks_round_trip(name: str, data: st.DataObject) -> None:
    fmt = BY_NAME[name]
    assert isinstance(fmt, AffineFormat)
    codes = data.draw(codes_of(fmt.bits))
    ends = hnp.arrays(np.float32, len(codes), elements=st.floats(-1e6, 1e6, width=32))
    scale, zero = data.draw(ends), data.draw(ends)
    payload = fmt.pack(scale, zero, codes)
    scale_again, zero_again, codes_again = fmt.unpack(payload)
    np.testing.assert_array_equal(scale_again.view(np.uint32), scale.view(np.uint32))
    np.testing.assert_array_equal(zero_again.view(np.uint32), zero.view(np.uint32))
    np.testing.assert_array_equal(codes_again, codes)
    assert payload[:, :8].tobytes() == np.stack([scale, zero], 1).tobytes()


@given(hnp.arrays(np.int8, st.tuples(st.integers(0, 5), st.just(32))), st.floats(0, 6e4, width=16))
def test_q8_blocks_round_trip(codes: np.ndarray, scale: float) -> None:
    scales = np.full(len(codes), scale, np.float16)
    payload = Q8F16.pack(scales, codes)
    assert payload.shape == (len(codes), 34)
    again, codes_again = Q8F16.unpack(payload)
    np.testing.assert_array_equal(again, scales)
    np.testing.assert_array_equal(codes_again, codes)
    np.testing.assert_array_equal(Q8F16.decode(payload), np.float32(scale) * codes.astype(np.float32))


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_f32_keeps_every_bit(values: np.ndarray) -> None:
    payload = F32_FORMAT.pack(values)
    assert payload.tobytes() == values.tobytes()
    np.testing.assert_array_equal(
        F32_FORMAT.decode(payload).reshape(-1).view(np.uint32), values.view(np.uint32)
    )


@given(hnp.arrays(np.float16, st.integers(0, 40), elements=st.floats(width=16, allow_nan=False)))
def test_f16_keeps_every_f16(values: np.ndarray) -> None:
    wide = values.astype(np.float32)
    assert F16_FORMAT.pack(wide).tobytes() == values.tobytes()
    np.testing.assert_array_equal(F16_FORMAT.decode(values.tobytes()).reshape(-1), wide)


def test_f16_rounds_to_nearest_even_and_refuses_what_it_cannot_hold() -> None:
    values = np.float32([1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0, -65519.0, 2.0**-26])
    want = np.float16([1, 1 + 2.0**-9, 65504, -65504, 0])
    np.testing.assert_array_equal(F16_FORMAT.unpack(F16_FORMAT.pack(values)), want)
    for beyond in (65520.0, -1e30):
        with pytest.raises(WeightError, match="F16"):
            F16_FORMAT.pack(np.float32([1.0, beyond]))


def test_a_two_bit_block_by_hand() -> None:
    """Levels -1, 0, 1, 2; codes 0 1 2 3 repeated: byte 0b11100100."""
    codes = np.tile(np.arange(4, dtype=np.uint8), 64)[None]
    payload = MQ2_LLOYD.pack(np.float16([[-1, 0, 1, 2]]), codes)
    assert payload.tobytes() == bytes.fromhex("00bc0000003c0040") + bytes([0b11100100]) * 64


def test_errors_are_the_houses() -> None:
    assert issubclass(HfqError, MqError)
