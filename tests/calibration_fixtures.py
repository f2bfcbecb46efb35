"""A calibration folder for small_model.CONFIG whose moments are known."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import small_model
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.statistics.moment_file import encode_layer, layer_file, layer_tensors
from mq_quant.formats.statistics.moment_folder import MANIFEST, config_record
from mq_quant.formats.statistics.triangles import pack_correlation, pack_moment

CONFIG = parse_config(small_model.CONFIG)
COUNTS = np.array([[700, 0, 90], [40, 60, 100]])
SOURCE = {
    "origin": {"repository": "a/b", "revision": "r1"},
    "files": {
        "config.json": {"bytes": 1, "sha256": "c"},
        "tokenizer.json": {"bytes": 1, "sha256": "t"},
        "model-1.safetensors": {"bytes": 1, "sha256": "s"},
    },
}
NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64}


def moment_of(seed: int, k: int = 256) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(2 * k, k)) * np.exp(np.linspace(-2, 2, k))
    return (x.T @ x / len(x)).astype(np.float32).astype(np.float64)


def write(folder: Path, down: str = "full", change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A folder for CONFIG whose moments are known: gate_up 100 + layer, down of expert e 10 · layer + e, pooled 50."""
    folder.mkdir()
    layers = []
    for layer in range(CONFIG.num_hidden_layers):
        tensors = layer_tensors(CONFIG, down)  # type: ignore[arg-type]
        arrays = {name: np.zeros(shape, NUMPY[dtype]) for name, (dtype, shape) in tensors.items()}
        arrays["gate_up.tokens"][:] = 395
        arrays["gate_up.counts"][:] = arrays["down.counts"][:] = COUNTS[layer]
        arrays["gate_up.moment"][:] = pack_moment(moment_of(100 + layer))
        arrays["gate_up.diagonal"][:] = np.diag(moment_of(100 + layer))
        arrays["down.pooled"][:] = pack_moment(moment_of(50))
        for e in np.flatnonzero(COUNTS[layer]):
            own = moment_of(10 * layer + int(e))
            arrays["down.diagonal"][e] = np.diag(own)
            if down != "pooled":
                arrays["down.moment"][e] = (pack_correlation if down == "compact" else pack_moment)(own)
        raw = b"".join(encode_layer(arrays))
        (folder / layer_file(layer)).write_bytes(raw)
        unseen = [int(e) for e in np.flatnonzero(COUNTS[layer] == 0)]
        notes = ["layer 1: something was left out"] if layer else []
        layers.append(
            {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "unseen": unseen, "notes": notes}
        )
    manifest: dict[str, Any] = {
        "schema": 1,
        "config": config_record(CONFIG),
        "source": copy.deepcopy(SOURCE),
        "tokens": {"sha256": "0", "sequences": 1, "length": 395},
        "down": down,
        "layers": layers,
    }
    if change:
        change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def set_key(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets manifest[path[0]][…] to the last of `path`."""

    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for key in path[:-2]:
            target = target[key]
        target[path[-2]] = path[-1]

    return change
