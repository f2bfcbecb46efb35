"""The memory that a file takes where the engine runs it, and the smallest usual machine that has it."""

from __future__ import annotations

from ...formats.engine_rules import CACHE_BITS, CONTEXT
from ...formats.minimax import ModelConfig

MACHINES_GB = (16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256)
HEADROOM = 2 * 10**9
"""Bytes for activations, the engine itself and the system."""


def cache_bytes(config: ModelConfig, context: int = CONTEXT) -> int:
    """Bytes of the engine's key/value cache for so many tokens, or for all that it runs the model with."""
    positions = min(context, CONTEXT, config.max_position_embeddings)
    values = positions * config.num_hidden_layers * 2 * config.kv_dim
    return round(values * CACHE_BITS / 8)


def run_bytes(total_bytes: int, config: ModelConfig) -> int:
    """The file, the key/value cache, and a little more."""
    return total_bytes + cache_bytes(config) + HEADROOM


def machine_for(total_bytes: int, config: ModelConfig) -> str:
    """The smallest usual memory that a file of so many bytes runs in."""
    need = run_bytes(total_bytes, config) / 1e9
    return next((f"{size} GB" for size in MACHINES_GB if size >= need), f"{need:.0f} GB")


NOTE = (
    f"fits in: the file, the engine's key/value cache ({CONTEXT} tokens at most, in Q8), and {HEADROOM / 1e9:.0f} GB "
    "for the rest"
)
