"""Plans: the published sizes, the file without holes, and what the engine could not run being refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from mq_quant.formats.errors import RecipeError, WeightError
from mq_quant.formats.minimax import ModelConfig, parse_config
from mq_quant.quantize.spec import calibration_sizes
from mq_quant.quantize.spec.estimates import plan_summary
from mq_quant.quantize.spec.plan import plan_tensors
from mq_quant.quantize.spec.recipe import Recipe, Rule, load_tier

CONFIG: dict[str, Any] = {
    "model_type": "minimax_m2",
    "vocab_size": 64,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 1e4,
    "intermediate_size": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def config(**changes: int) -> ModelConfig:
    return parse_config({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("tier", "gigabytes"),
    [
        ("mq4", 123.6),
        ("mq3-lloyd", 109.6),
        ("mq3", 102.6),
        ("mq2-lloyd", 86.2),
        ("mq2", 79.2),
        ("mq2-mini", 67.5),
    ],
)
def test_the_full_size_tiers_have_their_published_sizes(tier: str, gigabytes: float) -> None:
    result = plan_summary(tier, None, None, 1)
    assert round(result.total_bytes / 1e9, 1) == gigabytes
    by_format = result.by_format.values()
    assert sum(row.bytes for row in by_format) == result.payload_bytes < result.total_bytes
    assert sum(row.tensors for row in by_format) == result.tensor_count == 62 * (10 + 3 * 256 + 1) + 3
    assert result.peak_memory_bytes < 4 << 30
    shard = 230e9 / 125
    assert 0.95 * 2 * shard < (result.disk_bytes or 0) - result.total_bytes < 1.05 * 2 * shard


def test_a_plan_says_what_calibrating_takes() -> None:
    """Inside a build that is what one layer's experts see of 65536 tokens, and the residual streams around it."""
    few, many = (plan_summary("mq2", None, None, jobs) for jobs in (1, 64))
    assert few.calibration.tokens == 65536
    plain, inline, tuned = few.efforts
    assert (plain.effort, plain.tokens, plain.disk_bytes) == ("imatrix", 0, 0)
    assert plain.memory_bytes == few.peak_memory_bytes
    assert (inline.effort, inline.tokens) == ("calibrated", 65536)
    stream = 4 * 65536 * 3072
    assert 3 * stream < inline.disk_bytes < 1.03 * 3 * stream
    assert inline.memory_bytes > plain.memory_bytes and inline.hours > plain.hours
    assert many.efforts[1].memory_bytes > many.peak_memory_bytes
    assert (tuned.effort, tuned.tokens) == ("tuned", 65536)
    assert tuned.hours > inline.hours and tuned.disk_bytes == inline.disk_bytes + 2 * stream
    assert [cost.default for cost in few.efforts] == [True, False, False]
    assert [cost.default for cost in many.efforts] == [False, True, False]
    assert few.efforts[0].download_bytes == pytest.approx(230e9, rel=0.01)


def test_on_a_gpu_a_plan_counts_more_tokens_and_fewer_hours() -> None:
    slow, fast = (plan_summary("mq2", None, None, 2, device=device).efforts for device in ("cpu", "cuda"))
    assert [cost.tokens for cost in fast] == [0, 524288, 524288]
    assert [cost.default for cost in fast] == [False, False, True]
    assert all(quick.hours < long.hours for quick, long in zip(fast, slow, strict=True))


def test_tensors_follow_each_other_without_holes_and_each_layer_has_its_sidecar() -> None:
    tensors = plan_tensors(load_tier("mq2-lloyd"), config())
    at = 0
    for t in tensors:
        assert t.start == at
        assert t.nbytes == t.format.nbytes(math.prod(t.shape))
        at += t.nbytes
    sidecars = [t for t in tensors if t.spec is None]
    assert [(t.layer, t.shape, t.format.quant_type) for t in sidecars] == [(0, (512,), 1), (1, (512,), 1)]
    assert len({t.name for t in tensors}) == len(tensors)


def with_rule(tensors: str, fmt: str) -> Recipe:
    recipe = load_tier("mq4")
    return recipe.model_copy(update={"rules": (Rule(tensors=tensors, format=fmt), *recipe.rules)})


@pytest.mark.parametrize(
    ("tensors", "fmt", "named"),
    [
        ("gate.weight", "F16", "block_sparse_moe.gate.weight"),
        ("norm", "Q8F16", "model.layers.0.input_layernorm.weight"),
        ("e_score", "Q8F16", "e_score_correction_bias"),
        ("w2", "MQ4-Lloyd", "experts.0.w2.weight"),
        ("w1", "Q8F16", "experts.0.w1.weight"),
        ("q_proj", "MQ4", "self_attn.q_proj.weight"),
        ("embed", "F16", "model.embed_tokens.weight"),
        ("lm_head", "F32", "lm_head.weight"),
        (r"experts\.3\.w2", "MQ6", "layers.0.block_sparse_moe.experts.3.w2.weight"),
        (r"experts\.\d+\.w3", "MQ2-Lloyd", "layers.0.block_sparse_moe.experts.0.w3.weight"),
    ],
)
def test_formats_that_the_engine_cannot_run_are_refused_by_name(tensors: str, fmt: str, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_tensors(with_rule(tensors, fmt), config())
    assert named in str(caught.value)


def test_layers_may_differ_from_each_other() -> None:
    tensors = plan_tensors(with_rule(r"layers\.1\..*experts\.\d+\.w2", "MQ6"), config())
    assert {(t.layer, t.format.name) for t in tensors if t.name.endswith("w2.weight")} == {
        (0, "MQ4"),
        (1, "MQ6"),
    }


@pytest.mark.parametrize("changes", [{"hidden_size": 384}, {"intermediate_size": 128}])
def test_rows_that_do_not_fill_groups_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(WeightError, match="do not fill groups of 256"):
        plan_tensors(load_tier("mq4"), config(**changes))


@pytest.mark.parametrize(
    ("gigabytes", "tokens"),
    [(16, 65536), (24, 65536), (48, 131072), (80, 262144), (141, 524288), (0, 524288)],
)
def test_a_gpu_is_given_the_tokens_that_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, tokens: int
) -> None:
    monkeypatch.setattr(calibration_sizes, "gpu_memory", lambda: gigabytes * 10**9)
    released = parse_config(load_tier("mq2").model.config)
    assert calibration_sizes.usual_tokens(released, "cuda") == tokens
    assert calibration_sizes.usual_tokens(released, "cpu") == 65536


def test_without_scales_no_layer_has_a_sidecar() -> None:
    recipe = load_tier("mq2-lloyd")
    plain = plan_tensors(recipe, config(), scales=False)
    assert [t.name for t in plain] == [t.name for t in plan_tensors(recipe, config()) if t.spec is not None]
    assert all(a.start + a.nbytes == b.start for a, b in pairwise(plain))
