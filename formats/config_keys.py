"""Every key of config.json on which a forward pass could depend: what the engine does is stated, all else is refused.

The engine runs one arithmetic, that of MiniMax-M2. The config of a relative or of a fine-tune may ask for another one
by a key that the engine never reads. `TABLE` therefore names such keys, by themselves or by the form of their names,
with the values that ask for nothing else. Keys of training and bookkeeping are in the table as harmless; keys that are
not in it are reported by `unknown_keys`.
"""

from __future__ import annotations

import re

from .config_rules import (
    Config,
    Rule,
    among,
    any_value,
    factor,
    inverse_root,
    last_layer,
    no_shared_expert,
    no_window,
    off,
    one,
    same_as,
    true,
)
from .errors import ConfigError
from .text import shown

READ = frozenset(
    (
        *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "intermediate_size", "num_local_experts", "num_experts_per_tok"),
        *("rotary_dim", "rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"),
        *("rms_norm_eps", "max_position_embeddings", "quantization_config"),
    )
)
"""Keys that `minimax` reads and checks itself."""


_TRAINING = """
    .*dropout.* .*pdrop .*loss.* .*jitter.* .*coef.* .*_std init_.* .*_init .*initializ.* rescale_.* seed
    max_window_layers gradient_checkpointing.* pretraining_tp ep_size tp_.* unsloth.*
    chunk_size_feed_forward pad_vocab.*
"""
_BOOKKEEPING = """
    _.* .*token_ids? .*token_index .*dtype .*version .*date architectures auto_map model_name name_or_path license
    id2label label2id num_labels problem_type task_.* tokenizer_class torchscript return_dict use_return_dict
    output_(attentions|hidden_states|router_logits|scores) .*_implementation .*flash_att.* (use_)?cache.*
    use_(mem_eff_path|associative_scan|kernels?) residual_in_fp32 .*fp32.*
    num_logits_to_keep block_size chunk_size floor_scale
"""
_GENERATION = """
    do_sample temperature top_[kp] min_p typical_p repetition_penalty max_new_tokens (max|min)_length max_seq.*
    seq_length model_max_length original_max_position_embeddings is_decoder is_causal causal tie_encoder_decoder
"""
_LEFT_OUT = ".*mtp.* .*nextn.*"

_CONTRADICTION = "the two keys contradict each other"
_SCALED = "the engine multiplies by no such factor"
_SOFTMAX = "the engine runs softmax attention over all positions in every layer"
_ROOT = "the engine divides attention scores by sqrt(head_dim)"
_ROPE = "the engine turns the first rotary_dim of each head by rope_theta, unscaled"
_RMS = "the engine computes plain RMS norms, before attention and before the experts"
_MOE = "in every layer the engine runs experts, all of one size, and nothing else in their place"

TABLE = (
    Rule(_TRAINING, any_value),
    Rule(_BOOKKEEPING, any_value),
    Rule(_GENERATION, any_value),
    Rule(_LEFT_OUT, any_value),
    # The whole model
    Rule(
        "tie_word_embeddings",
        off,
        "the engine needs an lm_head.weight, and mq-quant makes none for a model that ties its embeddings",
    ),
    Rule(".*tied?_.* share_.*embed.*", off, "the engine has separate embeddings and lm_head"),
    Rule(
        "hidden_act(ivation)? activation(_function)? (ffn_)?act_fn mlp_(hidden_)?act.*",
        among(
            "silu",
            "swish",
        ),
        "the engine computes silu",
    ),
    Rule(
        ".*swiglu_.* .*act.*_limit clip_.* clamp.* .*sparsity.*",
        off,
        "the engine clips no activation and leaves none out",
    ),
    Rule(".*soft_?cap.*", off, "the engine caps no logits and no scores"),
    Rule("vision_.* audio_.* thinker.* .*_config", off, "the engine runs one text model"),
    Rule("is_encoder_decoder .*cross_att.* .*bidirectional.*", off, "the engine runs a causal decoder"),
    Rule(
        (
            "pruned_heads laurel_.* altup_.* .*per_layer_input hc_.* .*hyper_conn.* .*ngram.* ple_.* "
            "adapter_.* num_mem_blocks"
        ),
        off,
        "the engine has no such part",
    ),
    Rule("num_layers n_layers?", same_as("num_hidden_layers"), _CONTRADICTION),
    Rule("d_model n_embd dim_model_base embedding_(size|dim)", same_as("hidden_size"), _CONTRADICTION),
    Rule("padded_vocab_size", same_as("vocab_size"), _CONTRADICTION),
    Rule("n_heads", same_as("num_attention_heads"), _CONTRADICTION),
    Rule("kv_n_heads n_kv_heads num_kv_heads", same_as("num_key_value_heads"), _CONTRADICTION),
    Rule(
        "num_attention_heads_per_layer",
        same_as("num_attention_heads"),
        "the engine has one number of heads",
    ),
    Rule("attention_multiplier (attn|attention|softmax)_scal(e|ing)(_factor)?", inverse_root, _ROOT),
    Rule("query_pre_attn_scalar", same_as("head_dim"), _ROOT),
    Rule(
        (
            ".*multipliers? .*_alpha .*_beta .*_(alpha|beta)_factor scale_emb .*embed.*scale logits?_scal.* "
            "residual_scal.* .*out.*_scale attention_value_scale"
        ),
        factor,
        _SCALED,
    ),
    Rule("scale_depth .*scale_embed.* normalize_embed.* .*mup.* .*depth_scal.* embed.*norm.*", off, _SCALED),
    # Norms
    Rule("use_qk_(layer)?norm qk_(layer)?norm", true, "the engine normalises queries and keys"),
    Rule(
        "qk_norm_type",
        among("per_layer"),
        "the engine normalises a whole vector of queries, or of keys, at once",
    ),
    Rule(
        "layer_?norm_eps(ilon)? norm_eps(ilon)? qk_norm_eps(ilon)? rms_norm_epsilon",
        same_as("rms_norm_eps"),
        _CONTRADICTION,
    ),
    Rule("norm_type normalization(_function|_type)?", among("rmsnorm", "rms_norm", "rms"), _RMS),
    Rule("(use_)?rms_?norm (use_)?pre_?norm", true, _RMS),
    Rule(
        "norm_topk.* (.*_)?renorm.* route_norm moe_router_norm.* moe_normalize.*",
        true,
        "the engine divides the chosen experts' weights by their sum",
    ),
    Rule(
        (
            ".*post_?(att|mlp|ffn|layer|norm).* .*sandwich.* .*norm.*(offset|unit|zero|after|gemma).* "
            ".*(gemma|zero).*norm.* .*parallel_(res|att).*"
        ),
        off,
        _RMS,
    ),
    # Attention
    Rule("attn_type_list", among(1), _SOFTMAX),
    Rule(
        "layer_types layers_block_type layer_pattern attention_types? attn_types?",
        among(
            "full_attention",
            "full",
            "attention",
            "softmax",
            "global",
        ),
        _SOFTMAX,
    ),
    Rule("attn_layer_period global_attn_every.* layer_group_size", one, _SOFTMAX),
    Rule("sliding_window(_size)?", no_window, _SOFTMAX),
    Rule(".*sliding.* .*window.* .*local_att.* .*chunk.*att.* .*att.*chunk.* .*swa_.*", off, _SOFTMAX),
    Rule(
        (
            ".*linear_(att|num|key|value|conv|head).* .*mamba.* .*ssm.* .*conv.* .*recurrent.* .*lightning.* "
            ".*hybrid.* .*delta.* kda_.* time_step.*"
        ),
        off,
        _SOFTMAX,
    ),
    Rule(
        "index(er)?_.* .*sparse_(att|index|block|top).* dsa_.* nsa_.* compress.* .*use_long_context",
        off,
        _SOFTMAX,
    ),
    Rule(
        (".*lora_rank qk_.*head_dim .*(kv_shared|shared_kv|shared_att).* .*cla_.* attention_k_eq_v o_groups"),
        off,
        "the engine keeps every key and value of every head",
    ),
    Rule(
        (
            ".*sink.* .*temperature.* .*att.*gat.* .*gat.*att.* .*(output|value)_gat.* gating .*headwise.* "
            ".*diff_att.* .*talking.*"
        ),
        off,
        "the engine runs plain softmax attention",
    ),
    Rule(
        "[a-z]_head_dim kv_channels d_kv d_head (attention|global)_head_dim",
        same_as("head_dim"),
        "the engine has one head_dim",
    ),
    Rule("position_embedding_type pos(itional)?_emb.*", among("rope", "rotary"), _ROPE),
    Rule("use_rope use_rotary.* rope is_neox_style", true, _ROPE),
    Rule("no_rope_layers", one, _ROPE),
    Rule("rotary_emb_base (rope|rotary)_base global_rope_theta", same_as("rope_theta"), _ROPE),
    Rule(".*rope.* .*rotary.* .*alibi.*", off, _ROPE),
    # Mixture of experts
    Rule("use_routing_bias", true, "the engine adds e_score_correction_bias when it chooses experts"),
    Rule(
        (".*scor(e|ing)_func.* .*router_(act|func).* moe_router_.*score.* gating_func.* expert_selection_fn"),
        among("sigmoid"),
        "the engine scores experts by a sigmoid",
    ),
    Rule(
        "topk_method .*routing_method .*router_type",
        among("noaux_tc"),
        "the engine takes the experts with the best sums of score and bias",
    ),
    Rule(
        (
            "n_groups? num_groups? topk_groups? .*expert_groups? .*limited_groups "
            "moe_router_(num_groups|group_topk)"
        ),
        one,
        "the engine chooses among all experts at once",
    ),
    Rule(
        ".*scaling_factor route(r|d)?_scal.*",
        factor,
        "the engine uses the experts' normalised weights as they are",
    ),
    Rule(
        "shared_moe_mode",
        no_shared_expert,
        "files for the engine cannot hold a shared expert",
    ),
    Rule(
        ".*shared?_(exp|inter|moe|mlp).* .*(num|n)_shared.* use_shared.*",
        off,
        "files for the engine cannot hold a shared expert",
    ),
    Rule(
        "num_experts (n|num)_routed_experts moe_num_experts n_experts num_moe_experts",
        same_as("num_local_experts"),
        _CONTRADICTION,
    ),
    Rule(
        "moe_top_?k moe_k top_k_experts num_experts_per_token num_selected_experts n_activated_experts",
        same_as("num_experts_per_tok"),
        _CONTRADICTION,
    ),
    Rule(
        "moe_intermediate_size expert_(intermediate|ffn)_.*size ffn_hidden_size d_ff ffn_dim n_inner",
        same_as("intermediate_size"),
        _CONTRADICTION,
    ),
    Rule(
        (
            "(moe_)?layer_freq moe_(layer_)?(freq|interval|every).* decoder_sparse_step interleave_moe.* "
            "expert_layer_period"
        ),
        one,
        _MOE,
    ),
    Rule("moe_layer_end_index", last_layer, _MOE),
    Rule("mlp_layer_types ffn_types? mlp_types?", among("sparse", "moe"), _MOE),
    Rule("use_moe is_moe enable_moe_block (use_)?(gated_mlp|glu)", true, _MOE),
    Rule(
        (
            ".*dense.* mlp_only_layers intermediate_size_mlp .*(zero|null|identity)_expert.* "
            ".*layer_(start|offset).* .*hash.*layers .*double_wide.* moe_latent.* "
            "moe_apply_router_weight_on_input"
        ),
        off,
        _MOE,
    ),
    # Whatever is left of these two forms
    Rule(".*bias.*", off, "the engine adds no bias but that of the routing"),
    Rule(".*quant.* .*compression.*", off, "mq-quant reads what quantization_config says, and no other key"),
)
"""The first rule that fits a key counts."""

_RULES = tuple((re.compile("|".join(rule.keys.split())), rule) for rule in TABLE)


def rule_of(key: str) -> Rule | None:
    """The rule that a key falls under; None for keys that mq-quant does not know."""
    return next((rule for keys, rule in _RULES if keys.fullmatch(key)), None)


def check_keys(config: Config) -> None:
    """Refuse a config that asks for another arithmetic than the engine's; ConfigError names the key."""
    for key, value in config.items():
        rule = None if key in READ else rule_of(key)
        if rule is not None and not rule.accepts(value, config):
            raise ConfigError(f"config key {shown(key)} is {shown(value)}; {rule.engine}")


def unknown_keys(config: Config) -> tuple[str, ...]:
    """Keys that no rule covers and that are set to something."""
    return tuple(
        key
        for key, value in config.items()
        if key not in READ and not off(value, config) and rule_of(key) is None
    )
