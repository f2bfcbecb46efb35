"""MiniMax-M2: its config in the form that the engine reads, and the names, shapes and roles of its tensors.

No file is opened here. Which keys of a config are taken at all is said in `config_keys`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .config_keys import check_keys
from .errors import ConfigError
from .hfq.layout import COUNT_LIMIT
from .text import shown

Role = Literal["embed", "lm_head", "norm", "attn", "router", "bias", "expert"]
"""What a tensor is for; the engine's rules and the recipes go by it."""
StoredType = Literal["fp8", "bf16", "f32"]
"""How the released checkpoint stores a tensor; others may store it in any type that `checkpoint.weights` reads."""
PROJECTIONS = ("w1", "w2", "w3")
"""The matrices of an expert: gate, down and up."""
ARCH_ID = 10
"""MiniMax-M2 in the header of an HFQ file."""

_DIMENSIONS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "num_hidden_layers": 1 << 14,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "intermediate_size": 1 << 18,
    "num_local_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
}
"""The keys that a config must have, and the largest value that is believed: memory is taken by these numbers."""
_HEAD_LIMIT = 1 << 13
_LARGEST = (1 << 31) - 1
_LAYER_TENSORS = 11
"""Tensors of a layer beside its experts, the AWQ scale included."""
_OTHERS = {
    "minimax_m3": "MiniMax-M3 has sparse attention, a shared expert and clipped activations, which the engine does not "
    "run"
}
"""What is said of relatives, by the beginning of their model_type."""
_EXPLICIT = {"use_qk_norm": True, "use_routing_bias": True, "scoring_func": "sigmoid"}
"""Keys that a file must hold, since the engine's defaults for them are others."""
_MAY_BE_NULL = frozenset(("head_dim", "rope_theta", "rotary_dim", "rms_norm_eps", "max_position_embeddings"))
"""Keys that follow from others or have a default: null says no more than leaving them out."""
_ROPE_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "rotary_dim", "partial_rotary_factor", "factor"),
        *("original_max_position_embeddings", "max_position_embeddings"),
    )
)
_EXPERT = re.compile(r"model\.layers\.(\d{1,9})\.block_sparse_moe\.experts\.(\d{1,9})\.(w[123])\.weight")


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions of one MiniMax-M2 model; names follow config.json.

    `block_shape` gives the rows and columns of the weights that share an FP8 scale.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    block_shape: tuple[int, int] = (128, 128)

    @property
    def q_dim(self) -> int:
        """The length of all heads' queries together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """The length of all heads' keys together, which is that of the values too."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that the checkpoint must hold: its name, shape, how it is stored, and what it is for."""

    name: str
    shape: tuple[int, ...]
    stored: StoredType
    role: Role
    layer: int | None = None
    expert: int | None = None
    projection: str | None = None


def normalize_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the flat keys that the engine's loader reads, every other key kept.

    `rope_parameters` of newer files becomes `rope_theta` and `rotary_dim`; `use_qk_norm`, `use_routing_bias` and
    `scoring_func` are made explicit, because the loader's defaults for them run the model wrongly without a word.

    Raises ConfigError where the model is of another type, has absurd dimensions, or where a key asks for something that
    the engine does not run.
    """
    kind = raw.get("model_type")
    if kind != "minimax_m2":
        other = next((said for name, said in _OTHERS.items() if str(kind).startswith(name)), None)
        raise ConfigError(
            f"model_type is {shown(kind)}" + (f": {other}" if other else ", not 'minimax_m2'"),
            hint="mq-quant converts MiniMax-M2, M2.1, M2.5, M2.7 and what was made of them; check --source",
        )
    out = {key: value for key, value in raw.items() if value is not None or key not in _MAY_BE_NULL}
    for key, largest in _DIMENSIONS.items():
        _whole(key, raw.get(key), largest)
    out.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    _whole("head_dim", out["head_dim"], _HEAD_LIMIT)
    _check_tensor_count(raw)
    check_keys(out)
    out |= _rotary(out)
    out.setdefault("rms_norm_eps", 1e-6)
    out.setdefault("max_position_embeddings", 196608)
    _whole("max_position_embeddings", out["max_position_embeddings"])
    _positive("rms_norm_eps", out["rms_norm_eps"])
    return out | _EXPLICIT


def _check_tensor_count(raw: Mapping[str, Any]) -> None:
    """Refuse more tensors than the index of a file holds, before a list of them is made."""
    layers, experts = raw["num_hidden_layers"], raw["num_local_experts"]
    count = layers * (_LAYER_TENSORS + len(PROJECTIONS) * experts)
    if count > COUNT_LIMIT:
        raise ConfigError(
            f"num_hidden_layers {layers} and num_local_experts {experts} make {count} tensors; "
            f"a file holds at most {COUNT_LIMIT}"
        )


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rotary_dim, from wherever the config states them; contradictions and scaling are refused."""
    stated: dict[str, dict[str, Any]] = {"rope_theta": {}, "rotary_dim": {}}
    for key in stated:
        if config.get(key) is not None:
            stated[key][key] = config[key]
    if config.get("partial_rotary_factor") is not None:
        stated["rotary_dim"]["partial_rotary_factor"] = _share(config, "partial_rotary_factor", config)
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        _check_rope(name, rope)
        for key in ("rope_theta", "rotary_dim"):
            if rope.get(key) is not None:
                stated[key][f"{name}.{key}"] = rope[key]
        if rope.get("partial_rotary_factor") is not None:
            label = f"{name}.partial_rotary_factor"
            stated["rotary_dim"][label] = _share(rope, label, config)
    for key, newer in (("rope_theta", "rope_theta"), ("rotary_dim", "partial_rotary_factor")):
        if not stated[key]:
            raise ConfigError(f"the config has neither {key!r} nor 'rope_parameters.{newer}'")
        for label, value in stated[key].items():
            (_positive if key == "rope_theta" else _whole)(label, value)
        first, *others = stated[key]
        for other in others:
            if stated[key][other] != stated[key][first]:
                raise ConfigError(f"config key {first!r} and {other!r} contradict each other")
    return {key: next(iter(values.values())) for key, values in stated.items()}


def _share(holder: Mapping[str, Any], label: str, config: Mapping[str, Any]) -> int:
    """The rotary_dim that a partial_rotary_factor stands for."""
    head_dim: int = config["head_dim"]
    return round(head_dim * _positive(label, holder["partial_rotary_factor"]))


def _check_rope(name: str, rope: Any) -> None:
    """Refuse an object that scales the rotary embedding, or that holds a key that nobody knows."""
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config key {name!r} is not an object")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    unscaled = kind == "default" or (kind == "linear" and rope.get("factor") == 1)
    if not unscaled or rope.get("factor") not in (None, 1):
        raise ConfigError(
            f"config key {name!r} is {shown(rope)}: it scales its rotary embedding, which the engine does not run"
        )
    for key, value in rope.items():
        if key not in _ROPE_KEYS and value not in (None, False):
            raise ConfigError(
                f"config key {shown(f'{name}.{key}')} is {shown(value)}; the engine knows no such rotary embedding"
            )


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the dimensions of a config.json, normalised first; raises ConfigError where they do not fit."""
    c = normalize_config(raw)
    quantization = c.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ConfigError("config key 'quantization_config' is not an object")
    cfg = ModelConfig(
        **{key: c[key] for key in _DIMENSIONS},
        head_dim=c["head_dim"],
        rotary_dim=c["rotary_dim"],
        rope_theta=float(c["rope_theta"]),
        rms_norm_eps=float(c["rms_norm_eps"]),
        max_position_embeddings=c["max_position_embeddings"],
        block_shape=_block_shape(quantization.get("weight_block_size", [128, 128]), c),
    )
    if cfg.rotary_dim > cfg.head_dim or cfg.rotary_dim % 2:
        raise ConfigError(f"rotary_dim {cfg.rotary_dim} does not fit head_dim {cfg.head_dim}")
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ConfigError("num_attention_heads is not a multiple of num_key_value_heads")
    if cfg.num_experts_per_tok > cfg.num_local_experts:
        raise ConfigError("num_experts_per_tok is larger than num_local_experts")
    return cfg


def _block_shape(value: Any, config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the weights that share an FP8 scale; null stands for whole matrices.

    A whole matrix is a block that no side of an FP8 matrix exceeds.
    """
    if value is None:
        heads = config["num_attention_heads"] * config["head_dim"]
        side = max(heads, config["hidden_size"], config["intermediate_size"])
        return side, side
    if not (isinstance(value, list) and len(value) == 2):
        raise ConfigError(
            f"quantization_config.weight_block_size is {shown(value)}, not two positive integers"
        )
    rows, cols = (_whole("quantization_config.weight_block_size", side) for side in value)
    return rows, cols


def _whole(key: str, value: Any, largest: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        raise ConfigError(f"config key {key!r} is {shown(value)}, not a whole number from 1 to {largest}")
    return value


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise ConfigError(f"config key {key!r} is {shown(value)}, not a positive number up to {_LARGEST}")
    return float(value)


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expert_name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"


def expert_of(name: str) -> tuple[int, int, str] | None:
    """Undo `expert_name`: (layer, expert, projection), None for a tensor that is no expert's."""
    match = _EXPERT.fullmatch(name)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def awq_scale_name(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.awq_scale_gate_up.weight"


def scale_inv_name(weight: str) -> str:
    """The name of the block scales that belong to the FP8 tensor `weight`."""
    return f"{weight}_scale_inv"


def may_be_zero(name: str) -> bool:
    """Whether a weight of zeros only is no sign of damage: a fresh routing bias is one."""
    return name.endswith(".e_score_correction_bias")


def inventory(cfg: ModelConfig) -> Iterator[TensorSpec]:
    """Every weight the checkpoint must hold, in the order in which files are written."""
    h, v = cfg.hidden_size, cfg.vocab_size
    yield TensorSpec("model.embed_tokens.weight", (v, h), "bf16", "embed")
    for layer in range(cfg.num_hidden_layers):
        yield from layer_inventory(cfg, layer)
    yield TensorSpec("model.norm.weight", (h,), "bf16", "norm")
    yield TensorSpec("lm_head.weight", (v, h), "bf16", "lm_head")


def layer_inventory(cfg: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """The weights of one decoder layer, in file order: norms, attention, router, experts."""
    h, inter, p = cfg.hidden_size, cfg.intermediate_size, layer_prefix(layer)
    norms = (
        ("input_layernorm", h),
        ("post_attention_layernorm", h),
        ("self_attn.q_norm", cfg.q_dim),
        ("self_attn.k_norm", cfg.kv_dim),
    )
    for name, n in norms:
        yield TensorSpec(f"{p}{name}.weight", (n,), "bf16", "norm", layer)
    attn = (
        ("q_proj", (cfg.q_dim, h)),
        ("k_proj", (cfg.kv_dim, h)),
        ("v_proj", (cfg.kv_dim, h)),
        ("o_proj", (h, cfg.q_dim)),
    )
    for name, shape in attn:
        yield TensorSpec(f"{p}self_attn.{name}.weight", shape, "fp8", "attn", layer)
    moe = f"{p}block_sparse_moe."
    yield TensorSpec(f"{moe}gate.weight", (cfg.num_local_experts, h), "f32", "router", layer)
    yield TensorSpec(f"{moe}e_score_correction_bias", (cfg.num_local_experts,), "f32", "bias", layer)
    shapes = {"w1": (inter, h), "w2": (h, inter), "w3": (inter, h)}
    for e in range(cfg.num_local_experts):
        for proj in PROJECTIONS:
            yield TensorSpec(expert_name(layer, e, proj), shapes[proj], "fp8", "expert", layer, e, proj)
