"""MiniMax-M2 as the toolchain sees it: the config, its normalisation, and the inventory of tensors.

Pure metadata: no file is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError

Role = Literal["embed", "lm_head", "norm", "attn", "router", "bias", "expert"]
StoredType = Literal["fp8", "bf16", "f32"]
PROJECTIONS = ("w1", "w2", "w3")
ARCH_ID = 10

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
)
_LARGEST = 1 << 31
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MTP = re.compile(r"(model\.)?(mtp|nextn)\w*\.")
_EXPERT = re.compile(r"model\.layers\.(\d{1,9})\.block_sparse_moe\.experts\.(\d{1,9})\.(w[123])\.weight")


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions of one MiniMax-M2 model; names follow config.json."""

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
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
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

    Raises ConfigError where the model is of another type or a key contradicts what the engine can run.
    """
    if raw.get("model_type") != "minimax_m2":
        raise ConfigError(
            f"model_type is {raw.get('model_type')!r}, not 'minimax_m2'",
            hint="mq-quant converts MiniMax-M2 checkpoints only; check --source",
        )
    out = dict(raw)
    for key in _REQUIRED:
        _whole(key, raw.get(key))
    out.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    _whole("head_dim", out["head_dim"])
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError("config key 'rope_parameters' is not an object")
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        raise ConfigError("the config scales its rotary embedding, which the engine does not run")
    nested = dict(rope)
    if "partial_rotary_factor" in rope:
        factor = _positive("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"])
        nested["rotary_dim"] = round(out["head_dim"] * factor)
    for key, newer in (("rope_theta", "rope_theta"), ("rotary_dim", "partial_rotary_factor")):
        if key not in raw and key not in nested:
            raise ConfigError(f"the config has neither {key!r} nor 'rope_parameters.{newer}'")
        out.setdefault(key, nested.get(key))
        if key in nested and nested[key] != out[key]:
            raise ConfigError(f"config key {key!r} and 'rope_parameters.{newer}' contradict each other")
    out.setdefault("rms_norm_eps", 1e-6)
    out.setdefault("max_position_embeddings", 196608)
    for key in ("rotary_dim", "max_position_embeddings"):
        _whole(key, out[key])
    for key in ("rope_theta", "rms_norm_eps"):
        _positive(key, out[key])
    for key, needed in (("use_qk_norm", True), ("use_routing_bias", True), ("scoring_func", "sigmoid")):
        if out.get(key, needed) != needed:
            raise ConfigError(f"config key {key!r} is {_shown(out[key])}; the engine runs only {needed!r}")
        out[key] = needed
    if out.get("qk_norm_type", "per_layer") != "per_layer":
        raise ConfigError(f"config key 'qk_norm_type' is {out['qk_norm_type']!r}, not 'per_layer'")
    if out.get("shared_intermediate_size", 0):
        raise ConfigError("the config has a shared expert, which MiniMax-M2 files for the engine cannot hold")
    if out.get("tie_word_embeddings", False):
        raise ConfigError("the config ties its embeddings; the engine needs a separate lm_head")
    return out


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the dimensions of a config.json, normalised first; raises ConfigError where they do not fit."""
    c = normalize_config(raw)
    quantization = c.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ConfigError("config key 'quantization_config' is not an object")
    rows, cols = _block_shape(quantization.get("weight_block_size", [128, 128]))
    cfg = ModelConfig(
        **{key: c[key] for key in _REQUIRED},
        head_dim=c["head_dim"],
        rotary_dim=c["rotary_dim"],
        rope_theta=float(c["rope_theta"]),
        rms_norm_eps=float(c["rms_norm_eps"]),
        max_position_embeddings=c["max_position_embeddings"],
        block_shape=(rows, cols),
    )
    if cfg.rotary_dim > cfg.head_dim or cfg.rotary_dim % 2:
        raise ConfigError(f"rotary_dim {cfg.rotary_dim} does not fit head_dim {cfg.head_dim}")
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ConfigError("num_attention_heads is not a multiple of num_key_value_heads")
    if cfg.num_experts_per_tok > cfg.num_local_experts:
        raise ConfigError("num_experts_per_tok is larger than num_local_experts")
    return cfg


def _block_shape(value: Any) -> tuple[int, int]:
    """Rows and columns of the weights that share an FP8 scale; null stands for whole matrices."""
    if value is None:
        return _LARGEST, _LARGEST
    if not (isinstance(value, list) and len(value) == 2):
        raise ConfigError(
            f"quantization_config.weight_block_size is {_shown(value)}, not two positive integers"
        )
    rows, cols = (_whole("quantization_config.weight_block_size", side) for side in value)
    return rows, cols


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
        raise ConfigError(f"config key {key!r} is {_shown(value)}, not a positive integer below 2^31")
    return value


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise ConfigError(f"config key {key!r} is {_shown(value)}, not a positive number below 2^31")
    return float(value)


def _shown(value: Any) -> str:
    """A value from the file for a message, however long it is."""
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "out of range"
    return repr(value)[:80]


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


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a multi-token-prediction module, which files for the engine leave out.

    Such modules are named mtp or model.mtp, or they follow the last layer as further ones.
    """
    layer = _LAYER.match(name)
    beyond = layer is not None and int(layer[1]) >= config.num_hidden_layers
    return beyond or _MTP.match(name) is not None


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
