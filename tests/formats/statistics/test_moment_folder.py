"""Calibration folders as files: a manifest that states absurd things, and layers that change while they are in use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_fixtures import set_key, write
from mq_quant.formats.errors import CalibrationError
from mq_quant.formats.statistics.moment_file import layer_file
from mq_quant.formats.statistics.moment_folder import MANIFEST, MANIFEST_LIMIT, open_calibration


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_key("config", "num_local_experts", 10**9), "config.num_local_experts is 1000000000"),
        (set_key("config", "hidden_size", 0), "config.hidden_size is 0"),
        (set_key("config", "hidden_size", True), "config.hidden_size"),
        (set_key("config", "rope_theta", "fast"), "config.rope_theta"),
        (set_key("config", "surplus", 1), "holds 'surplus', which this program does not know"),
        (set_key("layers", 0, "sha256", 7), "layers.0.sha256"),
        (set_key("layers", 0, "bytes", -1), "layers.0.bytes"),
        (set_key("layers", 0, "unseen", ["all"]), "layers.0.unseen.0"),
        (set_key("source", "origin", []), "source.origin"),
        (lambda m: m.pop("tokens"), "tokens"),
        (lambda m: m["layers"].append(m["layers"][0]), "lists 3 layers of 2"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(
    change: Callable[[dict[str, Any]], Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="is not a whole manifest") as caught:
        open_calibration(write(tmp_path / "calib", change=change))
    assert problem in str(caught.value) and MANIFEST in str(caught.value)


def test_a_manifest_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "calib")
    with (folder / MANIFEST).open("ab") as f:
        f.truncate(MANIFEST_LIMIT + 1)
    with pytest.raises(CalibrationError, match="bytes, more than"):
        open_calibration(folder)


def test_other_moments_of_the_same_size_are_refused(tmp_path: Path) -> None:
    """Whether they came before the layer was opened, or between two reads of it."""
    folder = write(tmp_path / "calib")
    path = folder / layer_file(1)
    opened = open_calibration(folder)
    layer = opened.layer(1)
    assert layer.array("down.counts").dtype == np.int64
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CalibrationError, match=r"layer-00001\.safetensors: down\.diagonal: changed"):
        layer.row("down.diagonal", 0)
    with pytest.raises(CalibrationError, match="is not what the manifest says it is"):
        opened.layer(1)
    path.write_bytes(data)
    assert layer.row("down.diagonal", 0).any()
