"""What a calibration takes in memory and on the disk, from the config alone: for `plan` and before the work starts.

Depends on formats (calibration, minimax) and plan.
"""

from __future__ import annotations

import numpy as np

from ...formats.minimax import ModelConfig
from ...formats.statistics.moment_file import DownForm, layer_tensors
from .plan import BASE_MEMORY

CHUNK = 4096
"""Rows of activations turned to f64 at a time."""
USUAL_TOKENS = 128 * 512


def estimate(config: ModelConfig, tokens: int, down: DownForm) -> dict[str, int]:
    """Bytes of memory that a calibration needs at its peak, of one layer's file, and of the folder when it is done."""
    h, i, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    stream = 4 * tokens * h
    attention = 2 * stream + 4 * tokens * (3 * config.q_dim + 2 * config.kv_dim)
    busiest = min(tokens, 8 * -(-tokens * config.num_experts_per_tok // e))
    expert = 4 * busiest * (2 * h + 3 * i) + 4 * 6 * h * i
    moments = 8 * 3 * (h * h + 2 * i * i) + 8 * CHUNK * max(h, i)
    sizes = {"F32": 4, "F16": 2, "I64": 8}
    tensors = layer_tensors(config, down).values()
    layer = sum(sizes[dtype] * int(np.prod(shape)) for dtype, shape in tensors)
    table = 8 * config.vocab_size * h
    running = stream + max(attention, 3 * stream + expert + moments) + layer
    return {
        "memory_bytes": BASE_MEMORY + max(table + 2 * stream, running),
        "layer_bytes": layer,
        "folder_bytes": layer * config.num_hidden_layers,
        "unfinished_bytes": stream,
    }


def moment_bytes(config: ModelConfig, jobs: int) -> int:
    """Bytes of memory that rounding under full moments takes besides a build's own: of a layer, and of each worker."""
    return 8 * (4 * config.hidden_size**2 + jobs * 6 * config.intermediate_size**2)


def inline_estimate(config: ModelConfig, tokens: int, build: int = 0) -> dict[str, int]:
    """Bytes of memory at the peak, and of disk beside the output, for a build that calibrates itself.

    A layer is run and then encoded, never both at once; `build` is the memory of the encoding, moments included. Full
    moments of one layer lie on the disk, with the residual streams before and after it.
    """
    sizes = estimate(config, tokens, "full")
    return {
        "memory_bytes": max(sizes["memory_bytes"], build),
        "disk_bytes": sizes["layer_bytes"] + 2 * sizes["unfinished_bytes"],
    }
