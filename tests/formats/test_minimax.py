"""The config and its inventory: what is refused, what is made explicit, and the counts of the real model."""

import math
from collections import Counter
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.errors import ConfigError
from mq_quant.formats.minimax import (
    awq_scale_name,
    expert_name,
    expert_of,
    inventory,
    normalize_config,
    parse_config,
    scale_inv_name,
)

M2_7 = {
    "model_type": "minimax_m2",
    "hidden_size": 3072,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 5000000,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 1536,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "vocab_size": 200064,
    "max_position_embeddings": 204800,
    "use_mtp": True,
    "num_mtp_modules": 3,
    "quantization_config": {"weight_block_size": [128, 128]},
}
NEWER = {k: v for k, v in M2_7.items() if k not in ("rotary_dim", "rope_theta")}
ROPE = {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5}


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {k: v for k, v in (ROPE | changes).items() if v is not None}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ({"model_type": None}, "model_type is None"),
    *(
        ({"hidden_size": bad}, "'hidden_size' is")
        for bad in (None, 0, -1, True, 1.5, "3072", [], 2**31, 10**400)
    ),
    *(({"head_dim": bad}, "'head_dim' is") for bad in ("128", math.inf, 128.5)),
    ({"rope_theta": None}, "neither 'rope_theta' nor"),
    *(({"rope_theta": bad}, "'rope_theta' is") for bad in ("5e6", 0, -1, math.inf, math.nan, 10**400, True)),
    *(({"rms_norm_eps": bad}, "'rms_norm_eps' is") for bad in ("1e-6", 0, math.nan, 10**400)),
    *(({"quantization_config": bad}, "quantization_config") for bad in (1, "fp8", [1], True)),
    *(
        ({"quantization_config": {"weight_block_size": bad}}, "weight_block_size")
        for bad in (128, [128], [0, 128], [128, 1.5], [128, True], [128, 10**400])
    ),
    ({"rotary_dim": 130}, "rotary_dim 130 does not fit head_dim 128"),
    ({"rotary_dim": 63}, "rotary_dim 63"),
    ({"num_key_value_heads": 7}, "num_key_value_heads"),
    ({"num_experts_per_tok": 257}, "num_experts_per_tok"),
    ({"rope_scaling": {"type": "yarn"}}, "scales its rotary embedding"),
    (rope(rope_type="yarn"), "scales its rotary embedding"),
    ({"rope_parameters": [1]}, "'rope_parameters' is not an object"),
    (rope(rope_theta=10000), "'rope_theta' and 'rope_parameters.rope_theta' contradict"),
    (rope(partial_rotary_factor=1.0), "'rotary_dim' and 'rope_parameters.partial_rotary_factor' contradict"),
    (rope(partial_rotary_factor=math.nan), "partial_rotary_factor' is nan"),
    (rope(partial_rotary_factor="half"), "partial_rotary_factor' is 'half'"),
    ({"use_qk_norm": False}, "'use_qk_norm' is False"),
    ({"use_routing_bias": False}, "'use_routing_bias' is False"),
    ({"scoring_func": "softmax"}, "'scoring_func' is 'softmax'"),
    ({"qk_norm_type": "per_head"}, "'qk_norm_type' is 'per_head'"),
    ({"shared_intermediate_size": 1536}, "shared expert"),
    ({"tie_word_embeddings": True}, "ties its embeddings"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=lambda v: str(v)[:60])
def test_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as e:
        parse_config(M2_7 | changes)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize(
    "key", ["head_dim", "rms_norm_eps", "max_position_embeddings", "use_qk_norm", "scoring_func"]
)
def test_null_says_no_more_than_leaving_a_key_out(key: str) -> None:
    without = {k: v for k, v in M2_7.items() if k != key}
    assert normalize_config(M2_7 | {key: None}) == normalize_config(without)
    assert parse_config(M2_7 | {key: None}) == parse_config(without)


def test_null_beside_rope_parameters() -> None:
    assert parse_config(NEWER | rope() | {"rotary_dim": None, "rope_theta": None}) == parse_config(
        NEWER | rope()
    )
    with pytest.raises(ConfigError, match="neither 'rotary_dim' nor"):
        parse_config(M2_7 | {"rotary_dim": None})


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor"])
def test_newer_config_that_cannot_be_normalised(key: str) -> None:
    with pytest.raises(ConfigError, match=f"neither .* nor 'rope_parameters.{key}'"):
        parse_config(NEWER | rope(**{key: None}))


@pytest.mark.parametrize(
    "key", [k for k in M2_7 if isinstance(M2_7[k], int) and k in normalize_config(M2_7) and "mtp" not in k]
)
def test_every_needed_key_is_needed_or_defaulted(key: str) -> None:
    without = {k: v for k, v in M2_7.items() if k != key}
    defaults = {"head_dim": 64, "max_position_embeddings": 196608}
    if key in defaults:
        assert normalize_config(without)[key] == defaults[key]
    else:
        with pytest.raises(ConfigError, match=key):
            normalize_config(without)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(list(ROPE)), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*M2_7, "rope_parameters", "rope_scaling", "use_qk_norm"]), json_like))
@settings(deadline=None, max_examples=200)
def test_any_json_parses_or_is_refused(changes: dict[str, Any]) -> None:
    try:
        config = parse_config(M2_7 | changes)
    except ConfigError:
        return
    assert list(islice(inventory(config), 5))


def test_dangerous_defaults_are_made_explicit() -> None:
    out = normalize_config(NEWER | rope() | {"extra": [1, 2]})
    assert out["rotary_dim"] == 64
    assert out["rope_theta"] == 5000000
    assert out["use_qk_norm"] is True
    assert out["use_routing_bias"] is True
    assert out["scoring_func"] == "sigmoid"
    assert out["extra"] == [1, 2]
    assert out["rope_parameters"] == ROPE
    assert parse_config(out) == parse_config(M2_7)
    assert normalize_config(out) == out


def test_input_is_not_changed() -> None:
    before = dict(NEWER | rope())
    raw = dict(before)
    normalize_config(raw)
    assert raw == before


def test_the_real_model() -> None:
    """96,103 tensors with their scales, as the published checkpoint holds."""
    config = parse_config(M2_7)
    specs = list(inventory(config))
    assert len({s.name for s in specs}) == len(specs)
    assert len(specs) + sum(s.stored == "fp8" for s in specs) == 96103
    assert Counter(s.role for s in specs) == {
        "expert": 62 * 256 * 3,
        "attn": 62 * 4,
        "norm": 62 * 4 + 1,
        "router": 62,
        "bias": 62,
        "embed": 1,
        "lm_head": 1,
    }
    weights = sum(math.prod(s.shape) for s in specs)
    assert round(weights / 1e9, 1) == 228.7
    shapes = {s.name: s.shape for s in specs}
    assert shapes["model.layers.61.self_attn.q_norm.weight"] == (6144,)
    assert shapes["model.layers.61.self_attn.k_norm.weight"] == (1024,)
    assert shapes[expert_name(61, 255, "w2")] == (3072, 1536)
    assert specs[0].role == "embed" and specs[-1].role == "lm_head"


def test_names() -> None:
    assert scale_inv_name(expert_name(3, 7, "w1")) == (
        "model.layers.3.block_sparse_moe.experts.7.w1.weight_scale_inv"
    )
    assert expert_of(expert_name(2, 11, "w3")) == (2, 11, "w3")
    for other in ("lm_head.weight", awq_scale_name(2), expert_name(2, 11, "w4"), expert_name(2, 10**9, "w1")):
        assert expert_of(other) is None
    assert awq_scale_name(2) == "model.layers.2.block_sparse_moe.awq_scale_gate_up.weight"
