"""The rules of the engine: which formats it runs, and that a layer has one."""

from __future__ import annotations

from typing import get_args

import pytest
from mq_quant.formats.blocks import BY_NAME, FORMATS
from mq_quant.formats.engine_rules import RULES, refused, uneven
from mq_quant.formats.minimax import Role, TensorSpec, expert_name

RUNS = {
    "embed": {"Q8F16"},
    "lm_head": {"Q8F16"},
    "attn": {"Q8F16"},
    "router": {"Q8F16"},
    "norm": {"F16", "F32"},
    "bias": {"F16", "F32"},
    "expert": {"MQ4", "MQ6", "MQ2-Lloyd", "MQ3-Lloyd"},
}


def test_every_role_has_its_rule() -> None:
    assert set(RULES) == set(get_args(Role)) == set(RUNS)


@pytest.mark.parametrize("role", RUNS)
def test_formats_that_run_and_formats_that_do_not(role: Role) -> None:
    spec = TensorSpec("x", (256,), "bf16", role)
    for fmt in FORMATS.values():
        why = refused(spec, fmt.quant_type)
        assert (why is None) == (fmt.name in RUNS[role])
    assert refused(spec, 99)


def experts(*formats: str, layer: int = 0) -> list[tuple[TensorSpec, int]]:
    """w1, w3 and w2 of one expert after another in these formats."""
    out = []
    for i, name in enumerate(formats):
        projection = ("w1", "w3", "w2")[i % 3]
        tensor = expert_name(layer, i // 3, projection)
        spec = TensorSpec(tensor, (256, 256), "fp8", "expert", layer, i // 3, projection)
        out.append((spec, BY_NAME[name].quant_type))
    return out


def test_gate_and_up_share_a_format_and_down_has_its_own() -> None:
    assert list(uneven(experts("MQ4", "MQ4", "MQ6", "MQ4", "MQ4", "MQ6"))) == []
    assert list(uneven(experts("MQ4", "MQ4", "MQ6") + experts("MQ6", "MQ6", "MQ4", layer=1))) == []


def test_the_odd_one_and_its_model_are_named() -> None:
    odd = [(a.name, b.name) for a, b in uneven(experts("MQ4", "MQ6", "MQ4", "MQ4", "MQ4", "MQ6"))]
    assert odd == [
        (expert_name(0, 0, "w3"), expert_name(0, 0, "w1")),
        (expert_name(0, 1, "w2"), expert_name(0, 0, "w2")),
    ]


def test_other_tensors_do_not_matter() -> None:
    spec = TensorSpec("a", (256,), "bf16", "norm", 0)
    assert list(uneven([(spec, 1), (spec, 2)])) == []
