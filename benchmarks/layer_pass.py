"""The layer pass at the full width of MiniMax-M2.7: a few layers of random FP8 weights in memory, calibrated and
encoded as a build does it, for one tier or several at once.

    python benchmarks/layer_pass.py --device cuda                  # 65,536 tokens, tier mq2
    python benchmarks/layer_pass.py --device cuda --sequences 1024 # 524,288 tokens
    python benchmarks/layer_pass.py --device cuda --apart          # how long calibrating and encoding take alone
    python benchmarks/layer_pass.py --device cuda --trace out.png  # and a picture of what the GPUs did from layer 1 on
    python benchmarks/layer_pass.py --experts 4 --sequences 2      # a look on the CPU

A layer's seconds are those from the end of the one before to its own, `model_minutes` those of 62 such layers. The
first layer compiles kernels and takes memory, and the last one has none beside it. `before_the_layers` are the seconds
in which the source runs forward and back on all layers, to find what errors behind them cost. `cpu` is the processor
time of all threads in seconds, `busy` the share of samples, ten a second, in which the first GPU ran.
CUDA_VISIBLE_DEVICES says which GPUs take part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_trace import draw, kernels_of
from mq_quant.formats.checkpoint.safetensors_file import TensorInfo
from mq_quant.formats.errors import MqError
from mq_quant.formats.fp8 import dequantize, scale_shape
from mq_quant.formats.minimax import ModelConfig, inventory
from mq_quant.quantize.calibrate.on_the_fly import GatheredImportance
from mq_quant.quantize.encode.encoders import Encoder, open_encoder
from mq_quant.quantize.encode.prepared_layer import fit_settings
from mq_quant.quantize.pipeline.build_spec import BuildSpec
from mq_quant.quantize.pipeline.encoding import Encoded, in_step, prepare_layer
from mq_quant.quantize.pipeline.turns import LayersInTurn
from mq_quant.quantize.pipeline.work_units import WorkUnit, work_order
from mq_quant.quantize.pipeline.worker_pool import Workers, run_steps
from mq_quant.quantize.spec.plan import Plan, plan_tensors
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

    @property
    def shards(self) -> tuple[str, ...]:
        return ("memory",)

    def schedule(self, names: Sequence[str]) -> None:
        """Nothing is fetched."""

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


@dataclass
class Watched:
    """Prints a row for each layer; `row` begins the next one."""

    device: str
    began: float = field(default_factory=time.monotonic)
    cpu: float = field(default_factory=time.process_time)
    rows: list[dict[str, Any]] = field(default_factory=list)
    trace: Any = None

    def row(self, layer: int, samples: list[int], **parts: float) -> None:
        now, cpu = time.monotonic(), time.process_time()
        seconds = now - self.began
        row = {"layer": layer, "seconds": seconds, **parts, "model_minutes": seconds * LAYERS / 60}
        row |= {"cpu": cpu - self.cpu, "busy": sum(s > 0 for s in samples) / max(1, len(samples))}
        if self.device == "cuda":
            row["device_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self.rows.append(row)
        if self.trace is not None and not layer:
            self.trace.start()
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        samples.clear()
        self.began, self.cpu = now, cpu


def spec_of(tier: str, source: Any, gathered: GatheredImportance) -> BuildSpec:
    """What a build of a tier works by, without its file."""
    recipe = load_tier(tier)
    plan = Plan(recipe, source.config, plan_tensors(recipe, source.config), 0, 0, 0)
    return BuildSpec(recipe, source, gathered, fit_settings(recipe), plan, {}, {}, gathered=gathered)


def in_turn(
    specs: Mapping[int, BuildSpec], encoder: Encoder, jobs: int, device: str, trace: Any = None
) -> list[dict[str, Any]]:
    """The layers as a build takes them; a `trace` is begun after the first."""
    gathered = specs[0].gathered
    assert gathered is not None
    orders = {n: [unit for unit in work_order(spec) if unit.layer is not None] for n, spec in specs.items()}
    last = {unit.layer: unit.key for unit in orders[0]}
    watched = Watched(device, trace=trace)
    with busy_samples(device) as samples:

        def deliver(n: int, unit: WorkUnit, done: Encoded | MqError) -> None:
            if isinstance(done, MqError):
                raise done
            if n == len(specs) - 1 and last[unit.layer] == unit.key:
                watched.row(int(unit.layer or 0), samples)

        steps = in_step(work_order(specs[0]), orders)
        run_steps(specs, steps, deliver, Workers(jobs, encoder, turns=LayersInTurn(gathered)))
    return watched.rows


def apart(spec: BuildSpec, encoder: Encoder, jobs: int, device: str) -> list[dict[str, Any]]:
    """The parts of a layer one after the other, with none beside it."""
    gathered, source, watched = spec.gathered, spec.source, Watched(device)
    assert gathered is not None
    for layer in range(source.config.num_hidden_layers):
        with busy_samples(device) as samples, ThreadPoolExecutor(jobs) as pool:
            marks = [time.monotonic()]
            gathered.begin_layer(layer)
            marks.append(time.monotonic())
            made = prepare_layer(spec, layer, encoder)
            marks.append(time.monotonic())
            experts = list(range(source.config.num_local_experts))
            blocks = [experts[at : at + made.together] for at in range(0, len(experts), made.together)]
            for block in pool.map(lambda some: made.encode_together([made], some, source), blocks):  # noqa: B023
                for (done,) in block:
                    if isinstance(done, MqError):
                        raise done
            marks.append(time.monotonic())
            parts = zip(("calibrate", "prepare", "encode"), pairwise(marks), strict=True)
            watched.row(layer, samples, **{name: later - earlier for name, (earlier, later) in parts})
    return watched.rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tier", action="append", help="default: mq2")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--no-sensitivity", action="store_true", help="without the run forward and back before the layers"
    )
    parser.add_argument("--apart", action="store_true", help="calibrate and encode one after the other")
    parser.add_argument(
        "--trace", type=Path, help="draw what the GPUs do to this file, which costs some time"
    )
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    source: Any = MemorySource(config(args.layers, args.experts))
    shape = (args.sequences, args.length)
    tokens = np.random.default_rng(1).integers(0, VOCAB, shape).astype(np.int32)
    tiers = args.tier or ["mq2"]
    trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if args.trace else None
    with tempfile.TemporaryDirectory() as folder, open_encoder(args.device) as encoder:
        gathered = GatheredImportance(
            source, tokens, args.device, ahead=not args.apart, sensitive=not args.no_sensitivity
        )
        gathered.bind({"origin": {}, "files": {}}, None)
        began = time.monotonic()
        gathered.open(Path(folder) / "calibration")
        print(json.dumps({"before_the_layers": round(time.monotonic() - began, 3)}), flush=True)
        specs = {n: spec_of(tier, source, gathered) for n, tier in enumerate(tiers)}
        rows = (
            apart(specs[0], encoder, args.jobs, args.device)
            if args.apart
            else in_turn(specs, encoder, args.jobs, args.device, trace)
        )
        if trace is not None:
            trace.stop()
            busy = draw(kernels_of(trace), "Kernels that ran at once, from the second layer on", args.trace)
            print(json.dumps({"traced_busy": round(busy, 3)}))
        gathered.finish()
        gathered.discard()
    if args.json:
        Path(args.json).write_text(json.dumps({"tiers": tiers, "tokens": int(tokens.size), "layers": rows}))


if __name__ == "__main__":
    main()
