"""Measurements: what is refused, and that what is written is read again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measurement_document import document
from mq_quant.formats.errors import MeasurementError
from mq_quant.formats.minimax import ModelConfig
from mq_quant.quantize.fit.measurement import (
    LIMIT,
    Measurement,
    read_measurement,
    whole_formats,
    whole_name,
)

CONFIG = ModelConfig(300, 256, 2, 2, 1, 256, 4, 2, 128, 64, 1e4, 1e-6, 128)


def written(path: Path, found: dict[str, Any]) -> Path:
    file = path / "m.json"
    file.write_text(json.dumps(found))
    return file


def test_a_file_that_is_missing_cut_or_no_json_is_refused(tmp_path: Path) -> None:
    whole = json.dumps(document())
    file = tmp_path / "m.json"
    with pytest.raises(MeasurementError, match="cannot be read"):
        read_measurement(file)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_text(whole[:cut])
        with pytest.raises(MeasurementError, match="is no measurement"):
            read_measurement(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MeasurementError, match="is not a plain file"):
        read_measurement(tmp_path / "pipe")
    with pytest.raises(MeasurementError, match="cannot be read: Is a directory"):
        read_measurement(tmp_path)
    file.write_bytes(b" " * (LIMIT + 1))
    with pytest.raises(MeasurementError, match="is larger than"):
        read_measurement(file)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-0.1", "1e999", "1e7", "null", "true", '"0.1"'])
def test_a_loss_that_is_no_number_of_nats_is_refused(tmp_path: Path, number: str) -> None:
    for where in ("pieces", "whole"):
        found = document()
        if where == "pieces":
            found["pieces"][2]["kld"]["MQ4"] = "HERE"
        else:
            found["whole"]["MQ2-Lloyd"] = "HERE"
        file = tmp_path / "m.json"
        file.write_text(json.dumps(found).replace('"HERE"', number))
        with pytest.raises(MeasurementError, match="is no measurement"):
            read_measurement(file)


def _lost(found: dict[str, Any]) -> None:
    del found["pieces"][1]


def _swapped(found: dict[str, Any]) -> None:
    found["pieces"].reverse()


def _twice(found: dict[str, Any]) -> None:
    found["pieces"].append(found["pieces"][-1])


def _no_format(found: dict[str, Any]) -> None:
    del found["pieces"][3]["kld"]["MQ4"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_lost, "holds 3 pieces, not gate_up and down of 2 layers"),
        (_swapped, "layer 0 gate_up is not where it belongs"),
        (_twice, "holds 5 pieces"),
        (lambda d: d["model"].update(layers=10**300), "holds 4 pieces"),
        (_no_format, "layer 1 down has not just the formats that were measured"),
        (lambda d: d["pieces"][0].update(projection="w1"), "projection"),
        (lambda d: d["pieces"][0]["kld"].update({"Q8F16": 0.1}), "the engine runs experts in"),
        (lambda d: d.update(formats=["MQ4", "MQ4"]), "names a format twice"),
        (lambda d: d.update(rest=1.0), "no piece loses anything beside the rest"),
        (lambda d: d.update(effort="tuned"), "effort"),
        (lambda d: d.update(calibration={"tokens": 0, "sha256": "1" * 64}), "calibration.tokens"),
        (lambda d: d.update(imatrix="not a hash"), "imatrix"),
        (lambda d: d.update(whole={}), "whole"),
        (lambda d: d.update(whole={"MQ6": 0.1}), "formats that were not measured"),
        (lambda d: d.update(kind="something"), "kind"),
        (lambda d: d.update(version=2), "has version 2, and this program reads 1"),
        (lambda d: d.update(more=1), "more"),
        (lambda d: d.pop("text"), "text"),
        (lambda d: d["model"].update(layers=0), "layers"),
        (lambda d: d["model"].update(files={"a": "b"}), "files"),
    ],
)
def test_what_is_not_whole_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    found = document()
    change(found)
    with pytest.raises(MeasurementError, match="is no measurement: .*" + said):
        read_measurement(written(tmp_path, found))


def test_another_model_is_refused() -> None:
    measured = Measurement.model_validate(document())
    measured.check_model(CONFIG)
    with pytest.raises(MeasurementError, match=r"another model: its hidden is 256 and the model's 512"):
        measured.check_model(replace(CONFIG, hidden_size=512))
    measured.check_model(CONFIG, {"folder": "here"})
    with pytest.raises(MeasurementError, match=r"it is of somebody/small and the model is other/small"):
        measured.check_model(CONFIG, {"repository": "other/small"})
    measured.check_model(CONFIG, None, {"config.json": "9" * 64, "model.safetensors": "2" * 64})
    with pytest.raises(MeasurementError, match=r"model.safetensors is not the same file") as e:
        measured.check_model(CONFIG, None, {"model.safetensors": "4" * 64})
    assert e.value.exit_code == 2
    with pytest.raises(MeasurementError, match=r"model.safetensors is not the same file"):
        measured.check_model(CONFIG, None, {})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    measured = Measurement.model_validate(document())
    file = tmp_path / "m.json"
    file.write_text(measured.text_json())
    assert read_measurement(file) == measured
    assert measured.loss(1, "down", "MQ3-Lloyd") == pytest.approx(0.01)
    assert len(file.read_text().splitlines()) < 60


def test_names_of_whole_choices() -> None:
    assert whole_name("MQ4", "MQ4") == "MQ4"
    for pair in (("MQ4", "MQ4"), ("MQ2-Lloyd", "MQ3-Lloyd")):
        assert whole_formats(whole_name(*pair)) == pair
