"""The smallest MiniMax-M2 checkpoint that has every kind of tensor; tests break it in one place at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mq_quant.formats.minimax import inventory, parse_config, scale_inv_name
from mq_quant.quantize.tiny.tokenizer import tokenizer_json
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "model_type": "minimax_m2",
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 5e6,
    "quantization_config": {"weight_block_size": [128, 128]},
}
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
W1_SCALE = W1 + "_scale_inv"

Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0, config: dict[str, Any] = CONFIG) -> Tensors:
    """Random tensors for a config, as the released checkpoints store them."""
    random = torch.Generator().manual_seed(seed)
    out: Tensors = {}
    for spec in inventory(parse_config(config)):
        values = torch.randn(spec.shape, generator=random)
        if spec.stored == "fp8":
            out[spec.name] = values.to(torch.float8_e4m3fn)
            tiles = [-(-n // 128) for n in spec.shape]
            out[scale_inv_name(spec.name)] = torch.rand(tiles, generator=random) + 0.5
        else:
            out[spec.name] = values.to(torch.bfloat16 if spec.stored == "bf16" else torch.float32)
    return out


def narrow_head(config: dict[str, Any] = CONFIG) -> torch.Tensor:
    """An lm_head that looks at two directions of the stream: few tokens tell then what errors behind layers cost."""
    random = torch.Generator().manual_seed(1)
    rows, directions = (
        torch.randn(shape, generator=random)
        for shape in ((config["vocab_size"], 2), (2, config["hidden_size"]))
    )
    return (0.02 * rows @ directions).to(torch.bfloat16)


def save(folder: Path, content: Tensors, shards: int = 2, config: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint folder of `shards` shards with an index; layers go to shards round robin by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    vocabulary = (CONFIG if config is None else config)["vocab_size"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
    names = list(content)
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: content[n] for n in names[i * size : (i + 1) * size]}
        save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
