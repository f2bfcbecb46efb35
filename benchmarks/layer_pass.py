"""The layer pass at the full width of MiniMax-M2.7: two layers of random FP8 weights in memory, calibrated and encoded
as a build does it; `model_minutes` are those of 62 such layers.

    python benchmarks/layer_pass.py --device cuda                  # 65,536 tokens, tier mq2
    python benchmarks/layer_pass.py --device cuda --sequences 1024 # 524,288 tokens
    python benchmarks/layer_pass.py --experts 4 --sequences 2      # a look on the CPU

The first layer compiles kernels and takes memory. `cpu` is the processor time of all threads in seconds, `busy` the
share of samples, ten a second, in which the first GPU ran. CUDA_VISIBLE_DEVICES says which GPUs take part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mq_quant.formats.checkpoint.safetensors_file import TensorInfo
from mq_quant.formats.errors import MqError
from mq_quant.formats.fp8 import dequantize, scale_shape
from mq_quant.formats.minimax import ModelConfig, inventory
from mq_quant.quantize.calibrate.on_the_fly import GatheredImportance
from mq_quant.quantize.encode.encoders import open_encoder
from mq_quant.quantize.encode.layer_encoder import FitSettings, LayerEncoder
from mq_quant.quantize.encode.on_device.layer import DeviceLayerEncoder
from mq_quant.quantize.spec.plan import plan_tensors
from mq_quant.quantize.spec.recipe import load_tier
from numpy.typing import NDArray

LAYERS, VOCAB = 62, 8192


def config(layers: int, experts: int) -> ModelConfig:
    """M2.7 with fewer layers, a smaller vocabulary, and as many experts as asked for."""
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=48,
        num_key_value_heads=8,
        intermediate_size=1536,
        num_local_experts=experts,
        num_experts_per_tok=min(8, experts),
        head_dim=128,
        rotary_dim=64,
        rope_theta=5e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=196608,
    )


@dataclass(frozen=True)
class MemorySource:
    """Weights of the right shapes in memory: every FP8 matrix is a piece of one run of random codes."""

    config: ModelConfig

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        kinds = {"fp8": "F8_E4M3", "bf16": "BF16", "f32": "F32"}
        return {
            spec.name: TensorInfo(spec.name, kinds[spec.stored], spec.shape, "memory", 0, 0)
            for spec in inventory(self.config)
        }

    @cached_property
    def _codes(self) -> NDArray[np.uint8]:
        values = np.random.default_rng(0).standard_normal(3 * 6144 * 3072, np.float32) * 64
        codes: NDArray[np.uint8] = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return codes

    def stored(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        shape = self.tensors[name].shape
        size = math.prod(shape)
        at = hash(name) % (len(self._codes) - size)
        scale = 1 / (64 * math.sqrt(shape[-1]))
        scales = np.full(scale_shape(shape, self.config.block_shape), scale, np.float32)
        return self._codes[at : at + size].reshape(shape), scales

    def weight(self, name: str) -> NDArray[np.float32]:
        info = self.tensors[name]
        if info.dtype == "F8_E4M3":
            return dequantize(*self.stored(name), self.config.block_shape)
        if len(info.shape) == 1:
            return np.ones(info.shape, np.float32)
        random = np.random.default_rng(len(name))
        out: NDArray[np.float32] = random.standard_normal(info.shape, np.float32)
        return out / np.float32(math.sqrt(info.shape[-1]))

    def release(self, name: str) -> None:
        """Nothing is kept."""


@contextmanager
def busy_samples(device: str) -> Iterator[list[int]]:
    """Whether the GPU ran, ten times a second; nothing without NVML."""
    samples: list[int] = []
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:
        yield samples
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    thread = threading.Thread(target=watch, daemon=True)
    if device != "cpu":
        thread.start()
    yield samples
    over.set()


def encoded(made: LayerEncoder, expert: int, source: Any) -> None:
    """Encode one expert; raises what prevents it."""
    (done,) = made.encode_together([made], expert, source)
    if isinstance(done, MqError):
        raise done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tier", default="mq2")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    source: Any = MemorySource(config(args.layers, args.experts))
    shape = (args.sequences, args.length)
    tokens = np.random.default_rng(1).integers(0, VOCAB, shape).astype(np.int32)
    recipe = load_tier(args.tier)
    planned = {t.name: t.format for t in plan_tensors(recipe, source.config)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, open_encoder(args.device) as encoder:
        gathered = GatheredImportance(source, tokens, args.device)
        gathered.bind({"origin": {}, "files": {}}, None)
        gathered.open(Path(folder) / "calibration")
        kind = DeviceLayerEncoder if gathered.stays else LayerEncoder
        for layer in range(args.layers):
            with busy_samples(args.device) as samples, ThreadPoolExecutor(args.jobs) as pool:
                marks, cpu = [time.monotonic()], time.process_time()
                gathered.begin_layer(layer)
                marks.append(time.monotonic())
                expert = f"model.layers.{layer}.block_sparse_moe.experts.0."
                formats = {p: planned[f"{expert}{p}.weight"] for p in ("w1", "w2", "w3")}
                made = kind(source.config, layer, gathered.layer(layer), formats, FitSettings(), encoder)
                made.prepare({name: source.weight(name) for name in made.needs_samples()})
                marks.append(time.monotonic())
                list(pool.map(lambda e: encoded(made, e, source), range(args.experts)))  # noqa: B023
                marks.append(time.monotonic())
            spent = [later - earlier for earlier, later in pairwise(marks)]
            row: dict[str, Any] = dict(zip(("calibrate", "prepare", "encode"), spent, strict=True))
            row |= {"layer": layer, "model_minutes": sum(spent) * LAYERS / 60}
            row["cpu"] = time.process_time() - cpu
            row["busy"] = sum(s > 0 for s in samples) / len(samples) if samples else None
            if args.device == "cuda":
                row["device_gib"] = torch.cuda.max_memory_reserved() / 2**30
            rows.append(row)
            print(
                json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )
        gathered.finish()
        gathered.discard()
    if args.json:
        Path(args.json).write_text(
            json.dumps({"tier": args.tier, "tokens": int(tokens.size), "layers": rows})
        )


if __name__ == "__main__":
    main()
