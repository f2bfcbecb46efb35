"""The family of MiniMax-M2: each released config is planned, pruned ones follow their config, and M3 is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats.config_keys import unknown_keys
from mq_quant.formats.errors import ConfigError, RecipeError
from mq_quant.formats.hub.client import Hub
from mq_quant.formats.minimax import normalize_config, parse_config
from mq_quant.quantize.spec.estimates import plan_summary, tier_table
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.spec.recipe import fitted_tiers, load_model, models, tiers

FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "float8_e4m3fn",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
SHAPE: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_mtp": True,
    "vocab_size": 200064,
}
RELEASED = {
    **SHAPE,
    "attn_type_list": [1] * 62,
    "auto_map": {
        "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
        "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
    },
    "qk_norm_type": "per_layer",
    "quantization_config": FP8,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "transformers_version": "4.46.1",
    "use_qk_norm": True,
    "use_routing_bias": True,
}
M2 = {
    **RELEASED,
    "bos_token_id": None,
    "eos_token_id": None,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "transformers_version": "4.57.1",
}
M2_OF_TRANSFORMERS_5 = {
    **SHAPE,
    "attention_dropout": 0.0,
    "bos_token_id": 200034,
    "eos_token_id": 200020,
    "initializer_range": 0.02,
    "output_router_logits": False,
    "quantization_config": {key: value for key, value in FP8.items() if key != "fmt"} | {"dequantize": False},
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "transformers_version": "5.0.0.dev0",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "MiniMax-M2": M2,
    "MiniMax-M2 in the form of transformers 5": M2_OF_TRANSFORMERS_5,
    "MiniMax-M2.1": RELEASED,
    "MiniMax-M2.5": RELEASED,
    "MiniMax-M2.7": {**RELEASED, "dtype": "bfloat16", "max_position_embeddings": 204800},
}
"""What the repositories hold as config.json."""
M3: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "text_config": {
        "num_hidden_layers": 60, "n_shared_experts": 1, "hidden_act": "swigluoai",
        "sparse_attention_config": {"use_sparse_attention": True},
    },
    "vision_config": {},
}  # fmt: skip


def in_folder(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_released_config_is_planned_without_a_key_that_nobody_knows(name: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    assert unknown_keys(config) == ()
    plan = plan_summary("mq2-lloyd", None, in_folder(tmp_path, config), 2)
    assert round(plan.total_bytes / 1e9, 1) == 86.2 and plan.memory == "96 GB"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "__init__", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["MiniMax-M2", "MiniMax-M2.1", "MiniMax-M2.5", "MiniMax-M2.7"])
def test_a_bundled_model_has_its_released_config(name: str) -> None:
    source = f"MiniMaxAI/{name}"
    recipe = choose_recipe("mq2", None, source)
    assert (recipe.model.name, recipe.model.place.repository) == (name, source)
    assert recipe.model == load_model(name.lower())
    bundled = normalize_config(recipe.model.config or {})
    released = normalize_config(PUBLISHED[name])
    known = {"bos_token_id", "eos_token_id", "auto_map", "transformers_version", "attn_type_list"}
    assert {k: v for k, v in bundled.items() if k not in known} == {
        k: v for k, v in released.items() if k not in known
    }
    plan = plan_summary("mq2", None, source, 1)
    assert (plan.model, plan.efforts[0].download_bytes) == (name, pytest.approx(230e9, rel=0.01))
    assert len(tier_table(source).tiers) == len(tiers()) + len(fitted_tiers())


def test_only_models_that_are_published_are_bundled() -> None:
    assert models() == ["minimax-m2", "minimax-m2.1", "minimax-m2.5", "minimax-m2.7", "tiny"]


@pytest.mark.parametrize(("experts", "parameters"), [(192, 172e9), (180, 162e9), (154, 139e9)])
def test_a_model_with_fewer_experts_follows_its_config(
    experts: int, parameters: float, tmp_path: Path
) -> None:
    """As the expert-pruned variants are published: everything is M2's but the number of experts."""
    config = {**M2, "num_local_experts": experts}
    plan = plan_summary("mq3", None, in_folder(tmp_path, config), 1)
    assert plan.tensor_count == 62 * (10 + 3 * experts + 1) + 3
    weights = sum(row.weights for row in plan.by_format.values())
    assert weights == pytest.approx(parameters, rel=0.01)
    assert parse_config(config).num_local_experts == experts


def test_a_shared_expert_stays_refused(tmp_path: Path) -> None:
    for changes in (
        {"shared_intermediate_size": 1536},
        {"shared_intermediate_size": 512, "qk_norm_type": None},
    ):
        with pytest.raises(ConfigError, match="shared expert"):
            plan_summary("mq2", None, in_folder(tmp_path, {**M2, **changes}), 1)


@pytest.mark.parametrize("kind", ["minimax_m3_vl", "minimax_m3"])
def test_m3_is_refused_in_one_true_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sparse attention, a shared expert") as refused:
        plan_summary("mq2", None, in_folder(tmp_path, {**M3, "model_type": kind}), 1)
    assert refused.value.problem.count(".") == 0 and f"model_type is '{kind}'" in refused.value.problem


def test_a_revision_is_of_a_repository() -> None:
    recipe = choose_recipe("mq2", None, "MiniMaxAI/MiniMax-M2.5", "v1")
    assert recipe.model.place.revision == "v1" and recipe.resolved()["model"]["source"]["revision"] == "v1"
    assert choose_recipe("mq2", None, None, "abc").model.place.revision == "abc"
    for source in ("tiny", "."):
        with pytest.raises(RecipeError, match="--revision goes with a hub repository"):
            choose_recipe("mq2", None, source, "main")
