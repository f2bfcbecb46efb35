"""Tuning of one layer at the full width of MiniMax-M2.7: random codes, attention and streams, all from memory.

    python benchmarks/tune_layer.py --device cuda                          # 65,536 tokens, as many epochs as a build
    python benchmarks/tune_layer.py --experts 2 --sequences 3 --length 64  # a look on the CPU

Experts share the bytes of one, which changes no time. `step` is a step of 4,096 tokens with everything around it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch
from layer_pass import LAYERS, config
from mq_quant.formats.blocks import AffineFormat, Format, LloydFormat
from mq_quant.formats.minimax import ModelConfig, awq_scale_name, expert_of, layer_inventory
from mq_quant.quantize.calibrate.layer_pass import with_others
from mq_quant.quantize.encode.overflow import encode_tensor
from mq_quant.quantize.spec.plan import plan_tensors
from mq_quant.quantize.spec.recipe import load_tier
from mq_quant.quantize.tune.layer import PLAIN, LayerTask, tune_layer
from mq_quant.quantize.tune.student import StoredTensor


def random_payload(fmt: Format, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A matrix of random codes, its weights of about the size of 1 / √K."""
    groups, size = int(np.prod(shape)) // 256, 1 / np.sqrt(shape[-1])
    codes = rng.integers(0, fmt.levels, (groups, 256)).astype(np.uint8)  # type: ignore[attr-defined]
    if isinstance(fmt, LloydFormat):
        levels = np.sort(rng.standard_normal((groups, fmt.levels)) * size, axis=1)
        return fmt.pack(levels.astype(np.float16), codes).reshape(-1)
    assert isinstance(fmt, AffineFormat)
    scale = np.full(groups, 3.5 * size / fmt.levels, np.float32)
    return fmt.pack(scale, -scale * (fmt.levels - 1) / 2, codes).reshape(-1)


def stored_layer(cfg: ModelConfig, tier: str) -> tuple[dict[str, StoredTensor], dict[str, np.ndarray]]:
    """A layer of random codes as a file stores it, and attention's matrices before they were rounded."""
    rng = np.random.default_rng(0)
    formats = {t.name: t.format for t in plan_tensors(load_tier(tier), cfg)}
    stored: dict[str, StoredTensor] = {}
    source: dict[str, np.ndarray] = {}
    shared: dict[str, np.ndarray] = {}
    for spec in layer_inventory(cfg, 0):
        fmt, place = formats[spec.name], expert_of(spec.name)
        if place is None:
            values = np.ones(spec.shape, np.float32)
            if len(spec.shape) > 1:
                values = rng.standard_normal(spec.shape, np.float32) / np.float32(np.sqrt(spec.shape[-1]))
            if spec.role == "attn":
                source[spec.name] = values
            payload = encode_tensor(spec.name, values, fmt, "hessian")
        else:
            if place[2] not in shared:
                shared[place[2]] = random_payload(fmt, spec.shape, rng)
            payload = shared[place[2]]
        stored[spec.name] = StoredTensor(fmt, spec.shape, payload)
    name = awq_scale_name(0)
    ones = np.ones(cfg.hidden_size, np.float32)
    stored[name] = StoredTensor(
        formats[name], ones.shape, encode_tensor(name, ones, formats[name], "hessian")
    )
    return stored, source


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tier", default="mq2")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=PLAIN.epochs)
    parser.add_argument("--profile", action="store_true", help="print where the device's time goes")
    args = parser.parse_args()
    cfg, device = config(1, args.experts), torch.device(args.device)
    devices = with_others(device)
    stored, source = stored_layer(cfg, args.tier)
    shape = (args.sequences, args.length, cfg.hidden_size)
    entering = torch.randn(shape, generator=torch.Generator().manual_seed(1)).numpy()
    target = entering + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(2)).numpy()
    task = LayerTask(cfg, 0, stored, source, entering, target)
    settings = replace(PLAIN, epochs=args.epochs)
    steps = args.epochs * -(-entering[..., 0].size // settings.batch)
    if args.profile:
        with torch.profiler.profile() as profile:
            tune_layer(task, settings, devices)
        print(
            profile.key_averages().table(sort_by="device_time_total", row_limit=40, max_name_column_width=70)
        )
        return
    few = replace(task, entering=entering[:16], target=target[:16])
    tune_layer(few, replace(PLAIN, epochs=1), devices)  # loads libraries and compiles kernels
    began = time.monotonic()
    result = tune_layer(task, settings, devices)
    seconds = time.monotonic() - began
    row = {"seconds": seconds, "step": seconds / steps, "model_minutes": seconds * LAYERS / 60}
    row |= {"before": result.before or 0.0, "after": result.after or 0.0}
    if args.device == "cuda":
        row["device_gib"] = torch.cuda.max_memory_reserved() / 2**30
    print(json.dumps({key: round(value, 4) for key, value in row.items()}))


if __name__ == "__main__":
    main()
