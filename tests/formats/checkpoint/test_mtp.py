"""Modules for multi-token prediction are told from decoder layers that the config does not count."""

from __future__ import annotations

from typing import Any

import pytest
import small_model
from mq_quant.formats.checkpoint.mtp import further_layers, modules
from mq_quant.formats.minimax import layer_inventory, parse_config

CONFIG = parse_config(small_model.CONFIG)
LAYER = [spec.name for spec in layer_inventory(CONFIG, 2)]
NORM = "model.layers.2.input_layernorm.weight"


def of(names: list[str], **keys: Any) -> tuple[set[str], set[str]]:
    found = further_layers(names, CONFIG, keys)
    assert bool(found.problem) == bool(found.uncounted)
    return set(found.mtp), set(found.uncounted)


def test_decoder_layers_and_what_stands_in_no_layer_are_neither() -> None:
    names = ["model.layers.1.input_layernorm.weight", "model.norm.weight", "lm_head.weight"]
    assert of(names, num_mtp_modules=3) == (set(), set())


@pytest.mark.parametrize("name", ["mtp.0.head.weight", "model.mtp.layers.0.enorm.weight", "model.nextn_1.w"])
def test_modules_with_a_name_of_their_own_need_no_count(name: str) -> None:
    assert of([name]) == ({name}, set())


@pytest.mark.parametrize(
    "key",
    [
        "num_mtp_modules",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "mtp_num_hidden_layers",
        "n_mtp_layers",
    ],
)
def test_the_config_counts_the_modules(key: str) -> None:
    far = NORM.replace(".2.", ".3.")
    assert of([NORM, far], **{key: 1}) == ({NORM}, {far})
    assert of([NORM, far], **{key: 2}) == ({NORM, far}, set())
    assert of([NORM], **{key: 0}) == (set(), {NORM})


@pytest.mark.parametrize(
    "part", ["eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"]
)
def test_tensors_that_join_a_token_to_a_state_make_a_module(part: str) -> None:
    names = [*LAYER, f"model.layers.2.{part}"]
    assert of(names) == (set(names), set())


def test_a_whole_decoder_layer_is_no_module() -> None:
    assert of(LAYER, num_mtp_modules=3) == (set(), set(LAYER))
    assert of(LAYER[1:], num_mtp_modules=3) == (set(LAYER[1:]), set())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 0),
        ({"num_mtp_modules": 3, "mtp_transformer_layers": 1}, 3),
        ({"num_mtp_modules": 2, "mtp_transformer_layers": 2, "use_mtp": True}, 4),
        ({"num_mtp_modules": 2, "mtp_transformer_layers": 0}, 2),
        *(({"num_mtp_modules": bad}, 0) for bad in (True, "3", None, -1, 10**9, 1.5)),
    ],
)
def test_counts_are_whole_numbers(config: dict[str, Any], count: int) -> None:
    assert modules(config) == count
