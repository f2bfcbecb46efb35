"""Whole builds at the width of M2.7: a few layers, its full vocabulary, and as many experts as asked for.

    python benchmarks/full_width_build.py --experts 16 --jobs 2
    python benchmarks/full_width_build.py --experts 16 --jobs 2 --effort calibrated --sequences 8
    python benchmarks/full_width_build.py --layers 3 --experts 256 --effort calibrated --effort tuned --sequences 128 \
        --device cuda --jobs 16

With 16 experts, 8 sequences of 512 tokens give each as many rows as 128 sequences do in M2.7.
Writes a random checkpoint with an imatrix to a temporary folder (2.5 GB, and 14 MB for each expert of each layer),
builds it with `mq-quant` once for each effort, and prints the rate and the peak memory of that process.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from mq_quant.formats.minimax import inventory, parse_config, scale_inv_name
from mq_quant.formats.statistics.imatrix import ImatrixEntry, write_imatrix
from mq_quant.quantize.spec.recipe import load_tier
from mq_quant.quantize.tiny.tokenizer import tokenizer_json
from safetensors.torch import save_file

NAMES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
TOKENS = 1024
"""Tokens of the tokenizer, at most: no text is read."""
COMMAND = (sys.executable, "-c", "from mq_quant.quantize.cli.app import main; main()")
POOL = 24 << 20
"""Random numbers of which all tensors are pieces."""


def write_checkpoint(folder: Path, layers: int, experts: int, **changes: int) -> None:
    """Full-width layers in the released layout, a shard per kind of tensor and layer; `changes` go into the config."""
    config = {
        **(load_tier("mq2-lloyd").model.config or {}),
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    parsed = parse_config(config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(min(TOKENS, parsed.vocab_size))))
    noise = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    codes, half = noise.to(torch.float8_e4m3fn), noise.bfloat16()
    random, weight_map = torch.Generator().manual_seed(1), {}
    for (role, layer), specs in groupby(inventory(parsed), lambda spec: (spec.role, spec.layer)):
        content, shard = {}, f"{role}-{layer}.safetensors"
        for spec in specs:
            size = math.prod(spec.shape)
            if spec.stored == "fp8":
                at = 4099 * len(weight_map) % (POOL - size)
                content[spec.name] = codes[at : at + size].view(spec.shape).clone()
                tiles = [-(-n // 128) for n in spec.shape]
                content[scale_inv_name(spec.name)] = 0.01 * (0.5 + torch.rand(tiles, generator=random))
            elif spec.stored == "bf16":
                content[spec.name] = half.repeat(-(-size // POOL))[:size].view(spec.shape)
            else:
                content[spec.name] = noise[:size].view(spec.shape).clone()
            weight_map |= dict.fromkeys([name for name in content if name not in weight_map], shard)
        save_file(content, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    energy = np.random.default_rng(0)
    width = dict(zip(NAMES, (parsed.hidden_size, parsed.hidden_size, parsed.intermediate_size), strict=True))
    entries = {
        f"blk.{layer}.{name}.weight": ImatrixEntry(
            np.exp(energy.normal(0, 1, (experts, width[name]))).astype(np.float32), np.full(experts, 1000.0)
        )
        for layer in range(layers)
        for name in NAMES
    }
    write_imatrix(folder / "imatrix.gguf", entries, ["random"], 1, 512)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tier", default="mq2-lloyd")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or hip")
    parser.add_argument("--effort", action="append", choices=("imatrix", "calibrated", "tuned"))
    parser.add_argument("--sequences", type=int, default=8, help="of 512 random tokens, to calibrate on")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "full-width"
        folder.mkdir()
        write_checkpoint(folder, given.layers, given.experts)
        ids = np.random.default_rng(1).integers(0, 200_000, (given.sequences, 512))
        np.save(folder / "tokens.npy", ids.astype(np.int32))
        for effort in given.effort or ["imatrix"]:
            build(given, folder, effort, Path(name) / effort)


def build(given: argparse.Namespace, folder: Path, effort: str, out: Path) -> None:
    """Build with one effort and print what it took."""
    options = ["--tier", given.tier, "--source", folder, "--imatrix", folder / "imatrix.gguf", "--json"]
    options += ["--effort", effort, "--jobs", str(given.jobs), "--output", out, "--device", given.device]
    if effort != "imatrix":
        options += ["--tokens", folder / "tokens.npy"]
    done = subprocess.run([*COMMAND, "build", *map(str, options)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout)
    what = f"tier {given.tier}, {effort}, {given.layers} layers of {given.experts} experts, {given.jobs} jobs"
    print(f"{what}, full vocabulary, on {result['device']}")
    print(f"seconds      {result['seconds']:.1f}")
    print(f"weights/s    {result['weights_per_second'] / 1e6:.1f} M")
    print(f"peak memory  {result['peak_rss_bytes'] / 2**30:.2f} GiB", flush=True)
    out.unlink()


if __name__ == "__main__":
    main()
