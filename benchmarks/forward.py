"""Time of the kernels' forward pass per token and stage, the weight bytes it reads, and the memory it takes.

    python benchmarks/forward.py [--backend auto|hip|cuda|cpu] [--formats MQ2-Lloyd MQ4] [--tokens 4] [--json]

Two models of random codes: the dimensions of the tiny source, and full-width layers of MiniMax-M2.7 with fewer experts.
Tokens are run one by one, as when text is generated. "weights" is what a token has to read: the dense tensors of every
layer, its routed experts and lm_head; "read" is what was read from the file, so equal numbers mean each byte once.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mq_quant.formats.blocks import BY_NAME, Format
from mq_quant.formats.hfq import TensorMeta, layout, open_hfq
from mq_quant.formats.minimax import ModelConfig, awq_scale_name, inventory, parse_config
from mq_quant.kernels.runtime.host import Backend, open_backend
from mq_quant.quantize.tiny.folder import TinySpec
from mq_quant.verify.model import kernel_forward as kernel_model
from mq_quant.verify.model.kernel_forward import KernelModel
from numpy.typing import NDArray

WIDE = TinySpec(
    hidden_size=3072,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=48,
    num_key_value_heads=8,
    num_local_experts=16,
    vocab_size=4096,
)
TILE = 1 << 12
"""Random groups per format; larger payloads repeat them."""


def payload(fmt: Format, weights: int) -> NDArray[np.uint8]:
    """Groups of random codes whose levels have a standard deviation of about 0.02."""
    rng = np.random.default_rng(fmt.quant_type)
    groups = rng.integers(0, 256, (min(TILE, weights // fmt.group), fmt.group_bytes), np.uint8)
    count = len(groups)
    if fmt.name in ("F16", "F32"):
        groups = np.ones((count, 1), "<f2" if fmt.name == "F16" else "<f4").view(np.uint8)
    elif fmt.name == "Q8F16":
        groups[:, :2] = np.full((count, 1), 0.02 / 73, "<f2").view(np.uint8)
    elif fmt.name.endswith("Lloyd"):
        levels = np.linspace(-0.035, 0.035, fmt.levels).astype("<f2")
        groups[:, : 2 * fmt.levels] = np.tile(levels, (count, 1)).view(np.uint8)
    else:
        head = np.array([[0.07 / (fmt.levels - 1), -0.035]], "<f4")
        groups[:, :8] = np.tile(head, (count, 1)).view(np.uint8)
    flat = np.ascontiguousarray(groups).reshape(-1)
    return np.resize(flat, fmt.nbytes(weights))


def tensors(cfg: ModelConfig, gate_up: str, down: str) -> Iterator[tuple[str, tuple[int, ...], Format]]:
    """(name, shape, format) of every tensor of a file, in order."""
    for spec in inventory(cfg):
        plain = {"norm": "F16", "bias": "F32"}.get(spec.role, "Q8F16")
        name = plain if spec.role != "expert" else down if spec.projection == "w2" else gate_up
        if spec.role == "router" and spec.layer is not None:
            yield awq_scale_name(spec.layer), (cfg.hidden_size,), BY_NAME["F16"]
        yield spec.name, spec.shape, BY_NAME[name]


def write_random_file(path: Path, raw_config: dict[str, Any], gate_up: str, down: str) -> None:
    """A well-formed file of random codes; one payload in memory at a time."""
    rows = list(tensors(parse_config(raw_config), gate_up, down))
    metas = [TensorMeta(n, f.quant_type, s, f.group_size, f.nbytes(math.prod(s))) for n, s, f in rows]
    with path.open("wb") as out:
        out.write(layout({"architecture": "minimax_m2", "config": raw_config}, metas).header)
        for _, shape, fmt in rows:
            out.write(payload(fmt, math.prod(shape)).data)


def measure(path: Path, raw_config: dict[str, Any], backend: Backend, tokens: int) -> dict[str, Any]:
    """Run `tokens` tokens one by one; seconds per token by stage, from the second token on."""
    cfg = parse_config(raw_config)
    spent: Counter[str] = Counter()
    began = 0.0

    def after(stage: str) -> None:
        nonlocal began
        backend.synchronize()
        now = time.perf_counter()
        spent[stage] += now - began
        began = now

    with open_hfq(path) as file:
        sizes = {entry.name: entry.nbytes for entry in file.entries}
        model = KernelModel(file, cfg, backend, tokens + 1, after)
        caches = [model.cache() for _ in range(cfg.num_hidden_layers)]
        weights = 0
        for token in range(tokens + 1):
            if token == 1:  # the first one compiled kernels
                spent.clear()
                weights, model.traffic.read = 0, 0
            began = time.perf_counter()
            h, at = model.embed(np.array([token])), model.positions(token, 1)
            for layer, cache in enumerate(caches):
                model.layer(layer, [h], [at], [cache])
            list(model.logits([h]))
            weights += token_bytes(cfg, sizes)
    return {
        "backend": backend.device,
        "tokens": tokens,
        "seconds_per_token": sum(spent.values()) / tokens,
        "stages": {stage: seconds / tokens for stage, seconds in spent.items()},
        "weight_bytes_per_token": weights // tokens,
        "read_bytes_per_token": model.traffic.read // tokens,
        "largest_layer_bytes": largest_layer(cfg, sizes),
        "loaded_bytes_peak": model.traffic.peak,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def token_bytes(cfg: ModelConfig, sizes: dict[str, int]) -> int:
    """Bytes of the weights that one token needs: all but the embeddings and the experts it does not route to."""
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    table = sizes["model.embed_tokens.weight"]
    routed = experts * cfg.num_experts_per_tok // cfg.num_local_experts
    return sum(sizes.values()) - experts - table + routed + table // cfg.vocab_size


def largest_layer(cfg: ModelConfig, sizes: dict[str, int]) -> int:
    layers = range(cfg.num_hidden_layers)
    return max(sum(n for name, n in sizes.items() if f".layers.{i}." in name) for i in layers)


def show(name: str, result: dict[str, Any]) -> None:
    print(f"{name} on {result['backend']}: {result['seconds_per_token'] * 1e3:.1f} ms per token")
    for stage, seconds in sorted(result["stages"].items(), key=lambda item: -item[1]):
        print(f"  {stage:<10} {seconds * 1e3:9.2f} ms")
    keys = ("weight_bytes_per_token", "read_bytes_per_token", "largest_layer_bytes", "loaded_bytes_peak")
    print("  MB: " + ", ".join(f"{key.removesuffix('_bytes')} {result[key] / 1e6:.1f}" for key in keys))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--formats", nargs=2, default=("MQ2-Lloyd", "MQ4"), metavar=("GATE_UP", "DOWN"))
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kernel_model.RESIDENT_BYTES = 0  # read every token's weights again, as a model larger than memory does
    results = {}
    with open_backend(args.backend) as backend, tempfile.TemporaryDirectory() as folder:
        for name, spec in (("tiny", TinySpec()), ("full width", WIDE)):
            path = Path(folder) / "model.hfq"
            write_random_file(path, spec.config(), *args.formats)
            results[name] = {**measure(path, spec.config(), backend, args.tokens), "spec": asdict(spec)}
            if not args.json:
                show(name, results[name])
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
