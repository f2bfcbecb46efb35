"""config.json and the index of a checkpoint: what they may say, and what is told of keys that nobody knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_model
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import ConfigError
from small_model import CONFIG

WHOLE = small_model.tensors()
FP8 = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "gptq"),
        ("quant_method", "compressed-tensors"),
        ("quant_method", ["fp8"]),
        ("fmt", "float8_e5m2"),
        ("fmt", "float8_e4m3fnuz"),
        ("scale_fmt", "int8"),
        ("activation_scheme", "none of these"),
        ("weight_block_size", [128]),
    ],
)
def test_codes_that_are_not_fp8_are_refused_by_their_key(key: str, value: Any, tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": FP8 | {key: value}}
    with pytest.raises(ConfigError, match=rf"config\.json: .*quantization_config\.{key}") as e:
        open_checkpoint(small_model.save(tmp_path, WHOLE, config=config))
    assert "incomplete" not in str(e.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_fmt": "ue8m0"},
        {"fmt": "e4m3"},
        {"activation_scheme": "static"},
        {"modules_to_not_convert": ["gate"]},
    ],
)
def test_fp8_as_tools_spell_it(changes: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": FP8 | changes}
    open_checkpoint(small_model.save(tmp_path, WHOLE, config=config)).validate()


def test_keys_that_nobody_knows_are_told(tmp_path: Path) -> None:
    config = CONFIG | {"frobnicate": 3, "plugh": None}
    (said,) = open_checkpoint(small_model.save(tmp_path, WHOLE, config=config)).notes
    assert "config.json has keys that mq-quant does not know" in said
    assert "frobnicate" in said
    assert "plugh" not in said


def test_a_config_that_nests_deeper_than_a_file_takes_is_refused(tmp_path: Path) -> None:
    folder = small_model.save(tmp_path, WHOLE)
    (folder / "config.json").write_text(json.dumps(CONFIG)[:-1] + ', "x": ' + "[" * 125 + "]" * 125 + "}")
    with pytest.raises(ConfigError, match=r"config\.json: nests deeper than 120 levels"):
        open_checkpoint(folder)


def test_a_config_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    folder = small_model.save(tmp_path, WHOLE)
    (folder / "config.json").write_text(json.dumps(CONFIG) + " " * (5 << 20))
    with pytest.raises(ConfigError, match=r"config\.json: has \d+ bytes, more than"):
        open_checkpoint(folder)
