"""Which models a kit holds: the dimensions of each, its block formats, its prompts and its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...spec.recipe import load_tier, tiers
from ...tiny.tokenizer import SPECIAL

VOCABULARY = 256 + len(SPECIAL)
"""Token ids of a kit's models: the bytes, and what a chat template needs."""
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 128


@dataclass(frozen=True)
class Shape:
    """The dimensions of one model of a kit."""

    hidden: int
    width: int
    experts: int
    used: int


@dataclass(frozen=True)
class KitModel:
    """One model of a kit: `layers` holds the block formats of each layer, of gate and up and of down."""

    name: str
    shape: Shape
    layers: tuple[tuple[str, str], ...]

    @property
    def gate_up(self) -> str:
        """The formats of gate and up, layer by layer."""
        return ", ".join(gate_up for gate_up, _ in self.layers)

    @property
    def down(self) -> str:
        """The formats of down, layer by layer."""
        return ", ".join(down for _, down in self.layers)

    def config(self) -> dict[str, Any]:
        """Its config.json, with the flat keys that the engine reads."""
        return {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            "hidden_size": self.shape.hidden,
            "intermediate_size": self.shape.width,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rotary_dim": 64,
            "rope_theta": 5000000,
            "rms_norm_eps": 1e-06,
            "max_position_embeddings": 4096,
            "num_local_experts": self.shape.experts,
            "num_experts_per_tok": self.shape.used,
            "vocab_size": VOCABULARY,
            "hidden_act": "silu",
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "use_routing_bias": True,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": VOCABULARY - len(SPECIAL),
        }


FULL = Shape(3072, 1536, 1, 1)
"""The width of M2.7. One expert: with more, the kit would be too large to be handed around."""
EIGHT = Shape(1024, 768, 8, 8)
"""Eight experts a token, as M2.7 has, since engines write kernels for that number; narrower, to stay small."""
MIXED = KitModel(
    "mixed",
    Shape(256, 256, 2, 2),
    (("MQ3-Lloyd", "MQ2-Lloyd"), ("MQ2-Lloyd", "MQ6"), ("MQ6", "MQ3-Lloyd")),
)
"""Other formats in each layer, as files have that are fitted to a size: an engine reads them for each layer."""
PROMPTS = {"one": (72,), "eight": (84, 104, 101, 32, 107, 105, 116, 46)}
"""Token ids by name. With one token, attention hands on its value whatever queries, keys and positions are."""


def kit_models() -> tuple[KitModel, ...]:
    """A model of full width for each pair of formats that a tier has, one of eight experts where both are equal, and
    one whose formats differ from layer to layer.
    """
    pairs = {tier: formats_of(tier) for tier in tiers()}
    full = [KitModel(tier, FULL, (pair,)) for tier, pair in pairs.items()]
    return (
        *full,
        *(KitModel(f"{tier}-eight", EIGHT, (pair,)) for tier, pair in pairs.items() if len(set(pair)) == 1),
        MIXED,
    )


def formats_of(tier: str) -> tuple[str, str]:
    """The formats of gate and up, and of down, of a bundled tier."""
    recipe = load_tier(tier)
    names = (f"model.layers.0.block_sparse_moe.experts.0.{p}.weight" for p in ("w1", "w2"))
    gate_up, down = (recipe.format_of(name).name for name in names)
    return gate_up, down
