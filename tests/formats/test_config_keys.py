"""Keys of config.json: what asks for another arithmetic is refused by its key, what asks for nothing is taken."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.config_keys import READ, TABLE, check_keys, rule_of, unknown_keys
from mq_quant.formats.errors import ConfigError
from mq_quant.formats.minimax import normalize_config
from mq_quant.quantize.spec.recipe import load_model
from small_model import CONFIG

REFUSED: list[tuple[str, Any]] = [
    ("hidden_act", "gelu"),
    ("hidden_act", "relu2"),
    ("mlp_hidden_act", "relu2"),
    ("swiglu_limit", 7.0),
    ("clip_qkv", 8.0),
    ("attn_type_list", [1, 0]),
    ("attn_type_list", [0]),
    ("layer_types", ["full_attention", "linear_attention"]),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("layers_block_type", ["attention", "mamba"]),
    ("attn_layer_period", 8),
    ("sliding_window", 512),
    ("sliding_window_pattern", 6),
    ("use_sliding_window", True),
    ("attention_chunk_size", 8192),
    ("attention_window_size", 128),
    ("linear_attn_config", {"kda_layers": [1]}),
    ("linear_num_key_heads", 16),
    ("mamba_d_state", 128),
    ("index_topk", 2048),
    ("kv_lora_rank", 512),
    ("q_lora_rank", 1536),
    ("v_head_dim", 64),
    ("qk_rope_head_dim", 64),
    ("num_kv_shared_layers", 2),
    ("attention_bias", True),
    ("qkv_bias", True),
    ("mlp_bias", True),
    ("use_bias", True),
    ("attention_sink", True),
    ("attn_output_gate", True),
    ("attn_temperature_tuning", 4),
    ("attention_multiplier", 0.5),
    ("query_pre_attn_scalar", 256),
    ("softmax_scale", 1.0),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("use_qk_norm", False),
    ("qk_norm_type", "per_head"),
    ("layer_norm_eps", 1e-5),
    ("norm_type", "layernorm"),
    ("postnorm", True),
    ("use_post_norm", True),
    ("sandwich_norm", True),
    ("zero_centered_rmsnorm", True),
    ("use_parallel_residual", True),
    ("embedding_multiplier", 12.0),
    ("embedding_multiplier", 0),
    ("scale_emb", 12),
    ("scale_depth", 1.4),
    ("dim_model_base", 512),
    ("residual_multiplier", 0.22),
    ("logits_scaling", 8.0),
    ("lm_head_multiplier", 0.5),
    ("mlp_multipliers", [1.0, 0.5]),
    ("layernorm_full_attention_alpha", 3.5),
    ("layernorm_mlp_beta", 2.0),
    ("full_attn_alpha_factor", 3.5),
    ("use_mup", True),
    ("norm_topk_prob", False),
    ("moe_renormalize", False),
    ("routed_scaling_factor", 2.5),
    ("moe_routed_scaling_factor", 2.0),
    ("route_scale", 2.5),
    ("scoring_func", "softmax"),
    ("moe_router_activation_func", "softmax"),
    ("use_routing_bias", False),
    ("topk_method", "group_limited_greedy"),
    ("n_group", 8),
    ("topk_group", 4),
    ("shared_intermediate_size", 1536),
    ("n_shared_experts", 1),
    ("num_shared_experts", 1),
    ("moe_shared_expert_intermediate_size", 512),
    ("first_k_dense_replace", 1),
    ("num_dense_layers", 1),
    ("moe_layer_freq", 2),
    ("moe_layer_freq", [0, 1]),
    ("decoder_sparse_step", 2),
    ("mlp_only_layers", [0]),
    ("moe_layer_end_index", 0),
    ("zero_expert_num", 2),
    ("moe_intermediate_size", 512),
    ("n_routed_experts", 64),
    ("moe_topk", 4),
    ("tie_word_embeddings", True),
    ("rope_interleave", True),
    ("use_rope", False),
    ("no_rope_layers", [1, 0]),
    ("alibi", True),
    ("rope_local_base_freq", 10000.0),
    ("position_embedding_type", "absolute"),
    ("vision_config", {"depth": 3}),
    ("quantization", "awq"),
    ("compression_config", {"format": "pack"}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "default", "factor": 4.0}),
    ("rope_scaling", {"rope_type": "default", "mrope_section": [16, 24, 24]}),
    ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e6, "partial_rotary_factor": 0.5}),
    ("rope_parameters", {"full_attention": {"rope_theta": 5e6}}),
    ("partial_rotary_factor", 1.0),
    ("rope_scaling", {"rope_type": "default", "rope_theta": 1e4}),
]

HARMLESS: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_activation": "Swish",
    "attn_type_list": [1, 1],
    "layer_types": ["full_attention", "full_attention"],
    "mlp_layer_types": ["sparse", "sparse"],
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 128**-0.5,
    "query_pre_attn_scalar": 128,
    "v_head_dim": 128,
    "final_logit_softcapping": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "shared_intermediate_size": 0,
    "n_shared_experts": None,
    "first_k_dense_replace": 0,
    "moe_layer_freq": [1, 1],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 1,
    "moe_intermediate_size": 256,
    "num_experts": 3,
    "embedding_multiplier": 1,
    "layernorm_full_attention_alpha": 1.0,
    "layernorm_linear_attention_beta": 1,
    "postnorm": False,
    "shared_moe_mode": None,
    "use_cache": True,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
    "num_nextn_predict_layers": 1,
    "num_mtp_modules": 3,
    "mtp_transformer_layers": 1,
    "use_mtp": True,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"rope_type": "default"},
    "rope_interleave": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
    "bos_token_id": None,
    "eos_token_id": [1, 2],
    "pretraining_tp": 1,
    "_name_or_path": "somewhere",
    "quantization": None,
    "scoring_func": None,
}


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda v: str(v)[:40])
def test_another_arithmetic_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as e:
        normalize_config(CONFIG | {key: value})
    assert len(str(e.value)) < 400


def test_a_config_that_spells_out_what_the_engine_does_is_taken() -> None:
    out = normalize_config(CONFIG | HARMLESS)
    assert out["scoring_func"] == "sigmoid"
    assert {key: out[key] for key in HARMLESS if key != "scoring_func"} == {
        key: value for key, value in HARMLESS.items() if key != "scoring_func"
    }
    assert unknown_keys(CONFIG | HARMLESS) == ()


@pytest.mark.parametrize("key", HARMLESS)
def test_each_harmless_key_by_itself(key: str) -> None:
    normalize_config(CONFIG | {key: HARMLESS[key]})


def test_null_is_neutral_in_every_rule() -> None:
    for rule in TABLE:
        assert rule.accepts(None, CONFIG), rule.keys


def test_a_window_that_another_key_turns_off() -> None:
    normalize_config(CONFIG | {"sliding_window": 4096, "use_sliding_window": False})


@pytest.mark.parametrize(
    "rope",
    [{}, {"type": "default"}, {"rope_type": "linear", "factor": 1.0}, {"rope_type": None}, None],
)
def test_rope_scaling_that_scales_nothing(rope: Any) -> None:
    normalize_config(CONFIG | {"rope_scaling": rope})


def test_rope_parameters_under_either_name() -> None:
    newer = {k: v for k, v in CONFIG.items() if k not in ("rotary_dim", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    for name in ("rope_parameters", "rope_scaling"):
        out = normalize_config(newer | {name: rope})
        assert (out["rope_theta"], out["rotary_dim"]) == (5e6, 64)
    assert normalize_config(newer | {"rope_theta": 5e6, "partial_rotary_factor": 0.5})["rotary_dim"] == 64


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_local_experts", 10**7),
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 10**4),
        ("hidden_size", 1 << 20),
        ("vocab_size", 1 << 30),
        ("head_dim", 1 << 20),
        ("num_attention_heads", 1 << 20),
        ("intermediate_size", 1 << 24),
    ],
)
def test_absurd_dimensions_are_refused_before_memory_is_taken(key: str, value: int) -> None:
    config = CONFIG | {"num_local_experts": 256} | {key: value}
    with pytest.raises(ConfigError, match=key):
        normalize_config(config)


def test_every_key_of_the_released_config_is_known() -> None:
    config = load_model("minimax-m2.7").config
    assert config
    check_keys(config)
    assert unknown_keys(config) == ()


def test_unknown_keys_are_named_where_they_are_set() -> None:
    assert unknown_keys({"frobnicate": 3, "quux": None, "hidden_size": 1, "plugh": False}) == ("frobnicate",)


def test_keys_that_are_read_stand_under_no_rule_of_the_table_by_accident() -> None:
    assert all(rule_of(key) is None or key in READ for key in READ)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from([key for key, _ in REFUSED] + list(HARMLESS)) | st.text(max_size=6)


@given(st.dictionaries(names, json_like, max_size=3))
def test_any_value_under_any_key_is_taken_or_refused(changes: dict[str, Any]) -> None:
    try:
        normalize_config(CONFIG | changes)
    except ConfigError as e:
        assert str(e).isprintable() or "\n" in str(e)
