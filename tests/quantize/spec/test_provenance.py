"""Provenance: what is said of the program, and what of it decides bytes."""

from __future__ import annotations

import re

import numpy as np
from mq_quant.quantize.spec import provenance
from mq_quant.quantize.spec.provenance import code, flatten, program


def test_flatten_names_every_leaf() -> None:
    assert dict(flatten({"a": {"b": 1, "c": [2]}, "d": None})) == {"a.b": 1, "a.c": [2], "d": None}


def test_the_program_says_its_version_and_commit() -> None:
    said = program()
    assert said["name"] == "mq-quant"
    assert said["commit"] is None or len(said["commit"]) == 40


def test_code_is_told_apart_by_its_sources_and_the_libraries_that_compute() -> None:
    said = code()
    assert set(said) == {"sources", "numpy", "numba", "scipy"} and said["numpy"] == np.__version__
    assert re.fullmatch("[0-9a-f]{16}", said["sources"])


def test_every_room_whose_sources_decide_bytes_is_there() -> None:
    for room in provenance.DECIDING:
        assert any((provenance.ROOT / room).rglob("*.py")), room
