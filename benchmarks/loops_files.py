"""Whether files collapse into repetition: continuations by the decoded files of a small MiniMax-M2.

    pip install 'mq-quant[bench]'
    python benchmarks/loops_files.py --source FOLDER FILE...

FOLDER holds the checkpoint and eval_tokens.npy. Prompts, lengths and figures are those of loops.py; the model is
transformers' own, with the checkpoint's weights and then with those of each file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loops import PROMPT, PROMPTS, figures, line
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import ModelConfig, expert_name, inventory, layer_prefix
from mq_quant.verify.model.hfq_weights import DecodedFile
from mq_quant.verify.model.reference import Weights
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM


def state(weights: Weights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """All weights f32 under the names of transformers, which stacks the experts of a layer."""

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(weights.weight(name), np.float32))

    def stacked(layer: int, projection: str) -> torch.Tensor:
        return torch.stack(
            [tensor(expert_name(layer, e, projection)) for e in range(config.num_local_experts)]
        )

    named = {spec.name: tensor(spec.name) for spec in inventory(config) if spec.role != "expert"}
    out = {name.replace("block_sparse_moe", "mlp"): values for name, values in named.items()}
    for layer in range(config.num_hidden_layers):
        experts = f"{layer_prefix(layer)}mlp.experts."
        out[f"{experts}gate_up_proj"] = torch.cat([stacked(layer, "w1"), stacked(layer, "w3")], 1)
        out[f"{experts}down_proj"] = stacked(layer, "w2")
    return out


def model_of(checkpoint: Checkpoint) -> Any:
    """The model of transformers of a checkpoint's config; its weights are still to come."""
    config, stated = checkpoint.config, dict(checkpoint.raw_config)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    rope["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    left_out = ("quantization_config", "architectures", "rope_theta")
    kept = {key: value for key, value in stated.items() if key not in left_out}
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**{**kept, "rope_parameters": rope})).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Repetition in continuations by files of a small MiniMax-M2."
    )
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--source", type=Path, required=True)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(given.source)
    tokens = np.load(given.source / "eval_tokens.npy")
    starts = torch.from_numpy(tokens[:PROMPTS, :PROMPT].astype(np.int64))
    source, model = model_of(checkpoint), model_of(checkpoint)
    source.load_state_dict(state(checkpoint, checkpoint.config))
    print("| file | greedy: in a loop | distinct | sampled: in a loop | distinct | perplexity |")
    print("|---|---|---|---|---|---|")
    print(line("source", figures(source, source, starts)), flush=True)
    for path in given.files:
        with open_hfq(path) as file:
            model.load_state_dict(state(DecodedFile(file), checkpoint.config))
        print(line(path.name, figures(model, source, starts)), flush=True)


if __name__ == "__main__":
    main()
