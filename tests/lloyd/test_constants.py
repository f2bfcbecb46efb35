"""The encoder's numbers stand in one table, with the type in which they are computed with."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from mq_quant.lloyd import constants
from mq_quant.lloyd.constants import BOTH_ENDS, INDEPENDENT, LONE, ONE_END, SHAKE, SHAKE_SEED, SWEEPS, WHOLE

ROOM = Path(constants.__file__).parent
NUMBERS = {name: value for name, value in vars(constants).items() if name.isupper()}


def test_numbers_have_one_of_four_types() -> None:
    assert len(NUMBERS) > 25
    assert {type(value) for value in NUMBERS.values()} == {int, float, np.float32, tuple}


@pytest.mark.parametrize(
    "literal",
    [
        "1e-3",
        "1e-4",
        "0.01",
        "1e38",
        "1e-12",
        "1e6",
        "65504",
        "12582912",
        "0.06",
        "0.14",
        "0.03",
        "0.015",
        "1.6",
    ],
)
def test_no_loop_repeats_a_number_of_the_table(literal: str) -> None:
    bare = re.compile(rf"(?<![\w.]){re.escape(literal)}(?![\w.])")
    for path in ROOM.rglob("*.py"):
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        assert path.name == "constants.py" or not bare.search(code), path


def test_numbers_that_decide_bytes_are_what_they_were() -> None:
    assert (8, np.float32(0.25), 77) == (SWEEPS, SHAKE, SHAKE_SEED)
    assert INDEPENDENT == (0.25, 0.25, 0.25, 0)
    assert (WHOLE, constants.PASSES) == (5 * (0.25,), 1)
    assert [round(float(shake) * 1200) for shake in LONE] == list(range(420, 0, -35))
    assert (BOTH_ENDS, ONE_END) == ((0.06, 0.14), (0.03, 0.015))
    assert (np.float32(1e-3), np.float32(0.01)) == (constants.RIDGE, constants.PIVOT_FLOOR)
    assert np.finfo(np.float16).max == constants.F16_MAX
    assert float(np.finfo(np.float16).smallest_subnormal) == constants.F16_SMALLEST
