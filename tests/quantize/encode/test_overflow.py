"""Weights beyond what a format stores: refused by name, at the first value that would be cut off and not before."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.blocks import F16_FORMAT, F32_FORMAT, MQ2_LLOYD, MQ3_LLOYD, MQ4, Q8F16, Format
from mq_quant.formats.errors import WeightError
from mq_quant.formats.fwht import rotate
from mq_quant.lloyd.encode import encode_rotated
from mq_quant.quantize.encode.overflow import check_levels, encode_tensor

NAME = "model.layers.3.self_attn.k_proj.weight"
VALUES = np.random.default_rng(2).standard_normal((4, 256)).astype(np.float32)
FITS = ("reference", "exact", "hessian")


def at(value: float) -> np.ndarray:
    """Good values, one of which is replaced."""
    values = VALUES.copy()
    values[2, 77] = value
    return values


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("fmt", "fits", "beyond"),
    [(F16_FORMAT, 65519.0, 65520.0), (Q8F16, 127 * 65519.0, 127 * 65521.0)],
    ids=lambda x: getattr(x, "name", str(x)),
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_is_refused_where_its_f16_would_be_infinite(
    fit: str, fmt: Format, fits: float, beyond: float, sign: int
) -> None:
    payload = encode_tensor(NAME, at(sign * fits), fmt, fit)  # type: ignore[arg-type]
    assert fmt.decode(payload).reshape(4, 256)[2, 77] == pytest.approx(sign * fits, rel=1e-3)
    with pytest.raises(WeightError, match="holds values of up to") as e:
        encode_tensor(NAME, at(sign * beyond), fmt, fit)  # type: ignore[arg-type]
    assert e.value.tensor == NAME and fmt.name in e.value.problem


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("fmt", [F16_FORMAT, Q8F16], ids=lambda f: f.name)
def test_what_is_no_number_is_refused(fmt: Format, value: float) -> None:
    with pytest.raises(WeightError) as e:
        encode_tensor(NAME, at(value), fmt, "exact")
    assert e.value.tensor == NAME


def test_f32_holds_everything_and_nothing_is_no_fault() -> None:
    assert (
        F32_FORMAT.decode(encode_tensor(NAME, at(3e38), F32_FORMAT, "exact")) == at(3e38).reshape(-1, 1)
    ).all()
    for fmt in (F16_FORMAT, F32_FORMAT):
        assert encode_tensor(NAME, np.empty(0, np.float32), fmt, "exact").size == 0


@pytest.mark.parametrize("fit", ["reference", "exact"])
@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ3_LLOYD], ids=lambda f: f.name)
def test_levels_that_were_cut_off_are_refused(fmt: Format, fit: str) -> None:
    def payload(size: float) -> np.ndarray:
        return encode_rotated(rotate(VALUES * np.float32(size)), fmt, fit)  # type: ignore[arg-type]

    check_levels(NAME, fmt, payload(1e4))
    with pytest.raises(WeightError, match=r"beyond 65504.* in 4 of 4 groups") as e:
        check_levels(NAME, fmt, payload(1e5))
    assert e.value.tensor == NAME


def test_levels_in_f32_are_refused_where_they_are_infinite() -> None:
    good = encode_rotated(rotate(VALUES * np.float32(1e30)), MQ4, "exact")
    check_levels(NAME, MQ4, good)
    scale, zero, codes = MQ4.unpack(good)  # type: ignore[attr-defined]
    scale[1] = 3e38
    with pytest.raises(WeightError, match="in 1 of 4 groups"):
        check_levels(NAME, MQ4, MQ4.pack(scale, zero, codes))  # type: ignore[attr-defined]


def test_a_payload_without_groups_is_no_fault() -> None:
    for fmt in (MQ2_LLOYD, MQ4):
        check_levels(NAME, fmt, np.empty(0, np.uint8))
