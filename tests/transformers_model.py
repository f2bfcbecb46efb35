"""transformers' own MiniMax-M2, as the judge of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.minimax import expert_name, inventory, layer_prefix
from mq_quant.verify.model.reference import Weights


def huggingface(checkpoint: Checkpoint, weights: Weights | None = None) -> Any:
    """transformers' model of a checkpoint's config, with its weights or with others."""

    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    given = weights or checkpoint
    cfg, raw = checkpoint.config, dict(checkpoint.raw_config)
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    rope["partial_rotary_factor"] = cfg.rotary_dim / cfg.head_dim
    keep = {k: v for k, v in raw.items() if k not in ("quantization_config", "architectures", "rope_theta")}
    model = MiniMaxM2ForCausalLM(
        MiniMaxM2Config(**{**keep, "rope_parameters": rope, "attn_implementation": "eager"})
    )
    state = {}
    for spec in inventory(cfg):
        if spec.role != "expert":
            name = spec.name.replace("block_sparse_moe", "mlp")
            state[name] = torch.from_numpy(given.weight(spec.name))
    for layer in range(cfg.num_hidden_layers):
        moe = f"{layer_prefix(layer)}mlp.experts."
        w1, w3, w2 = (
            np.stack([given.weight(expert_name(layer, e, w)) for e in range(cfg.num_local_experts)])
            for w in ("w1", "w3", "w2")
        )
        state[f"{moe}gate_up_proj"] = torch.from_numpy(np.concatenate([w1, w3], axis=1))
        state[f"{moe}down_proj"] = torch.from_numpy(w2)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return model.eval()
