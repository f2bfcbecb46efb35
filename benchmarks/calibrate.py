"""Time and memory of a calibration at the full width of MiniMax-M2.7, from two layers of random FP8 weights.

    python benchmarks/calibrate.py [--device cpu|cuda] [--sequences 128] [--layers 2] [--down compact] [--json]

The layers run through `mq_quant.quantize.calibrate` as they would from a local checkpoint: FP8 codes are dequantised
with their block scales, moved to the device and run on all tokens; only the disk that holds the shards is left out.
`forward` is the same without an observer, so that the share of the moments shows. `model` is the mean layer times 62.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layer_pass import LAYERS, VOCAB, config
from mq_quant.formats.fp8 import dequantize, scale_shape
from mq_quant.formats.minimax import ModelConfig, inventory
from mq_quant.formats.statistics.moment_file import DOWN_FORMS
from mq_quant.quantize.calibrate.run import CalibrationOptions, calibrate
from mq_quant.quantize.spec.calibration_sizes import calibration_sizes
from mq_quant.verify.model.reference import embed, layer_forward
from numpy.typing import NDArray


class RandomSource:
    """Weights of the right shapes: one set of random FP8 codes per shape, rolled by the tensor's name."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.config, self.origin = cfg, {"folder": "random"}
        self.random = np.random.default_rng(0)
        self.specs = {spec.name: spec for spec in inventory(cfg)}
        self.codes: dict[tuple[int, ...], NDArray[np.uint8]] = {}

    def weight(self, name: str) -> NDArray[np.float32]:
        spec = self.specs[name]
        if spec.role == "norm":
            return np.ones(spec.shape, np.float32)
        if spec.stored != "fp8":
            return self.random.standard_normal(spec.shape, np.float32) / np.float32(math.sqrt(spec.shape[-1]))
        if spec.shape not in self.codes:
            values = self.random.standard_normal(spec.shape, np.float32) * 64
            self.codes[spec.shape] = (
                torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            )
        codes = np.roll(self.codes[spec.shape], len(name) % spec.shape[0], axis=0)
        scale = 1 / (64 * math.sqrt(spec.shape[-1]))
        scales = np.full(scale_shape(spec.shape, self.config.block_shape), scale, np.float32)
        return dequantize(codes, scales, self.config.block_shape)

    def fingerprint(self, *_: object) -> dict[str, dict[str, Any]]:
        return {}

    def schedule(self, names: list[str]) -> None:
        """Nothing is fetched."""

    def disk_bytes(self) -> int:
        return 0

    def release(self, name: str) -> None:
        """Nothing is kept."""


def forward_seconds(source: RandomSource, tokens: NDArray[np.int32], device: str) -> float:
    """Seconds of one layer on all tokens, weights read and moved included."""
    with torch.inference_mode():
        hidden = embed(source, tokens).to(device)
        began = time.monotonic()
        float(layer_forward(source, source.config, 0, hidden).sum())
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--down", default="compact", choices=DOWN_FORMS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source: Any = RandomSource(config(args.layers, 256))
    shape = (args.sequences, args.length)
    tokens = np.random.default_rng(1).integers(0, VOCAB, shape).astype(np.int32)
    if args.device == "cuda":
        torch.ones(256, 256, device="cuda").double().matmul(torch.ones(256, 256, device="cuda").double())
    forward = forward_seconds(source, tokens, args.device)
    with tempfile.TemporaryDirectory() as folder:
        options = CalibrationOptions(args.down, device=args.device)
        result = calibrate(source, tokens, Path(folder) / "calib", options)
    gpu = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    layer = result.seconds / args.layers
    row = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores",
        "tokens": int(tokens.size),
        "down": args.down,
        "forward_seconds": round(forward, 2),
        "layer_seconds": round(layer, 2),
        "model_minutes": round(layer * LAYERS / 60, 1),
        "host_bytes": result.peak_rss_bytes,
        "device_bytes": gpu,
        "estimate_bytes": calibration_sizes(source.config, tokens.size, args.down).memory_bytes,
        "layer_file_bytes": result.estimate.layer_bytes,
    }
    print(json.dumps(row) if args.json else "\n".join(f"{key:17} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
