"""Formats of layers in a line: runs are told as runs, and a format that all layers have needs no layers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.quantize.spec.by_layer import formats_by_layer


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        ({}, "none"),
        ({0: "A", 1: "A"}, "A"),
        ({0: "A", 1: "B"}, "A in layer 0, B in layer 1"),
        ({2: "A", 0: "A", 1: "A", 3: "B", 5: "A"}, "A in layers 0-2 5, B in layer 3"),
    ],
)
def test_it_is_told_in_runs(formats: dict[int, str], told: str) -> None:
    assert formats_by_layer(formats) == told


@given(st.dictionaries(st.integers(0, 61), st.sampled_from(["A", "B", "C"]), min_size=1))
def test_every_layer_is_told_once(formats: dict[int, str]) -> None:
    told = formats_by_layer(formats)
    if len(set(formats.values())) == 1:
        assert told in formats.values()
        return
    found = {}
    for part in told.split(", "):
        name, _, runs = re.split(r" in (layers?) ", part)
        for run in runs.split():
            first, _, last = run.partition("-")
            for layer in range(int(first), int(last or first) + 1):
                assert layer not in found
                found[layer] = name
    assert found == formats
