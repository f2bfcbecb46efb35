"""A whole build at the width of M2.7: one layer, its full vocabulary, and as many experts as asked for.

    python benchmarks/full_width_build.py --experts 16 --jobs 2
    python benchmarks/full_width_build.py --experts 16 --jobs 2 --effort calibrated --sequences 8

With 16 experts, 8 sequences of 512 tokens give each as many rows as 128 sequences do in M2.7.
Writes a random checkpoint with an imatrix to a temporary folder (about 2.7 GB for 16 experts), builds it with the
installed `mq-quant`, and prints the rate and the peak memory of that process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from mq_quant.formats.minimax import inventory, parse_config, scale_inv_name
from mq_quant.formats.statistics.imatrix import ImatrixEntry, write_imatrix
from mq_quant.quantize.spec.recipe import load_tier
from safetensors.torch import save_file

NAMES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def write_checkpoint(folder: Path, experts: int) -> None:
    """One full-width layer in the released layout, a shard per kind of tensor."""
    config = {
        **(load_tier("mq2-lloyd").model.config or {}),
        "num_hidden_layers": 1,
        "num_local_experts": experts,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    random, weight_map = torch.Generator().manual_seed(0), {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for spec in inventory(parse_config(config)):
        content = shards.setdefault(spec.role, {})
        if spec.stored == "fp8":
            content[spec.name] = torch.randn(spec.shape, generator=random).to(torch.float8_e4m3fn)
            tiles = [-(-n // 128) for n in spec.shape]
            content[scale_inv_name(spec.name)] = 0.01 * (0.5 + torch.rand(tiles, generator=random))
        else:
            dtype = torch.bfloat16 if spec.stored == "bf16" else torch.float32
            content[spec.name] = torch.empty(spec.shape, dtype=dtype).normal_(generator=random)
        if spec.role in ("embed", "lm_head"):
            save_file(shards.pop(spec.role), folder / f"{spec.role}.safetensors")
            weight_map[spec.name] = f"{spec.role}.safetensors"
    for role, content in shards.items():
        save_file(content, folder / f"{role}.safetensors")
        weight_map |= dict.fromkeys(content, f"{role}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    energy = np.random.default_rng(0)
    width = {"ffn_gate_exps": 3072, "ffn_up_exps": 3072, "ffn_down_exps": 1536}
    entries = {
        f"blk.0.{name}.weight": ImatrixEntry(
            np.exp(energy.normal(0, 1, (experts, width[name]))).astype(np.float32), np.full(experts, 1000.0)
        )
        for name in NAMES
    }
    write_imatrix(folder / "imatrix.gguf", entries, ["random"], 1, 512)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tier", default="mq2-lloyd")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or hip")
    parser.add_argument("--effort", default="imatrix", choices=("imatrix", "calibrated", "tuned"))
    parser.add_argument("--sequences", type=int, default=8, help="of 512 random tokens, to calibrate on")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "full-width"
        folder.mkdir()
        write_checkpoint(folder, given.experts)
        command = Path(sys.executable).with_name("mq-quant")
        options = ["--tier", given.tier, "--source", folder, "--imatrix", folder / "imatrix.gguf", "--json"]
        options += ["--effort", given.effort]
        if given.effort != "imatrix":
            ids = np.random.default_rng(1).integers(0, 200_000, (given.sequences, 512))
            np.save(folder / "tokens.npy", ids.astype(np.int32))
            options += ["--tokens", folder / "tokens.npy"]
        options += ["--jobs", str(given.jobs), "--output", Path(name) / "out", "--device", given.device]
        done = subprocess.run([command, "build", *options], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    what = f"tier {given.tier}, {given.effort}, {given.experts} experts, {given.jobs} jobs"
    print(f"{what}, full vocabulary, on {result['device']}")
    print(f"seconds      {result['seconds']:.1f}")
    print(f"weights/s    {result['weights_per_second'] / 1e6:.1f} M")
    print(f"peak memory  {result['peak_rss_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
