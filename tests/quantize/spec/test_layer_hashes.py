"""Hashes of layers: tables of strangers are refused, and a hash follows everything that the engine sees of a layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats.errors import RecipeError
from mq_quant.formats.hfq import TensorMeta
from mq_quant.quantize.spec.layer_hashes import (
    LIMIT,
    HashTable,
    bundled_table,
    empty_table,
    layer_hash,
    read_table,
)
from mq_quant.quantize.spec.recipe import load_model, load_tier, models, tiers

GOOD: dict[str, Any] = {"schema": 1, "model": "m", "tiers": {"mq2": {"0": "0123456789abcdef"}}}
W1 = TensorMeta("model.layers.0.a.weight", 19, (2, 256), 256, 144)
W2 = TensorMeta("model.layers.0.b.weight", 3, (2, 256), 32, 544)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {**GOOD, "schema": 2},
        {**GOOD, "tiers": {"mq2": {"0": "xyz"}}},
        {**GOOD, "tiers": {"mq2": {"-1": "0123456789abcdef"}}},
        {**GOOD, "tiers": {"mq2": {"first": "0123456789abcdef"}}},
        {**GOOD, "tiers": {"mq2": ["0123456789abcdef"]}},
        {**GOOD, "imatrix_sha256": "abc"},
        {**GOOD, "more": 1},
    ],
)
def test_what_is_no_table_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match="no table of layer hashes"):
        read_table(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1, "schema": 1}', "[" * 5000, " " * (LIMIT + 1)])
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(RecipeError, match=r"layers\.json: is "):
        read_table(tmp_path / "layers.json")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_table(tmp_path / "none.json")


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = empty_table("m").with_hashes({"mq3": {10: "a" * 16, 2: "b" * 16}, "mq2": {0: "c" * 16}})
    table = table.with_hashes({"mq3": {2: "d" * 16}})
    (tmp_path / "t.json").write_text(table.text())
    assert read_table(tmp_path / "t.json") == table
    assert (table.of("mq3", 2), table.of("mq3", 10), table.of("mq3", 3)) == ("d" * 16, "a" * 16, None)
    assert list(table.tiers["mq3"]) == [2, 10]


def test_a_hash_follows_names_formats_shapes_order_and_bytes() -> None:
    rows = [(W1, "1" * 16), (W2, "2" * 16)]
    others = [
        [(replace(W1, name="model.layers.0.c.weight"), "1" * 16), rows[1]],
        [(replace(W1, quant_type=20), "1" * 16), rows[1]],
        [(replace(W1, shape=(1, 512)), "1" * 16), rows[1]],
        [(W1, "3" * 16), rows[1]],
        rows[::-1],
        rows[:1],
    ]
    hashes = [layer_hash(tensors) for tensors in (rows, *others)]
    assert len(set(hashes)) == len(hashes) and layer_hash(rows) == hashes[0]


def test_every_model_has_a_table_and_the_tiny_one_is_full() -> None:
    for name in models():
        table = bundled_table(load_model(name).place.repository)
        assert isinstance(table, HashTable) and table.model == load_model(name).name
    tiny = bundled_table("tiny")
    assert tiny is not None and sorted(tiny.tiers) == sorted(tiers())
    assert all(sorted(tiny.tiers[tier]) == [0, 1] for tier in tiers())
    assert bundled_table("acme/other") is None and load_tier("mq2").model.name == "MiniMax-M2.7"
