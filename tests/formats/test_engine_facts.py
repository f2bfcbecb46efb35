"""The table of engine facts: it covers what the rules allow, and it refuses whatever is not a fact."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import get_args

import pytest
from mq_quant.formats.blocks import BY_NAME, EXPERT_FORMATS
from mq_quant.formats.engine_facts import (
    WARNED,
    EngineFact,
    EngineFactError,
    Projection,
    concerns,
    engine_facts,
    parse_facts,
)
from mq_quant.formats.minimax import TensorSpec, expert_name

FACT = """
[[fact]]
projection = "down"
formats = ["MQ4"]
state = "wrong"
seen = 2026-08-22
what = "it is wrong"
way_out = "take another"
source = "a commit"
"""


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (FACT, "", "holds no"),
        (FACT, "[[fact", "is no TOML"),
        (FACT, "fact = 3", "holds no"),
        ('source = "a commit"', "", "source is missing"),
        ("seen = 2026-08-22", "", "seen is missing"),
        ("seen = 2026-08-22", 'seen = "August"', "seen is no date"),
        ("seen = 2026-08-22", "seen = 2026-08-22T10:00:00", "seen is no date"),
        ('"down"', '"w2"', "projection is 'w2', not one of gate and up, down"),
        ('"wrong"', '"broken"', "state is 'broken'"),
        ('["MQ4"]', '["MQ5"]', "formats is not a list of block formats"),
        ('["MQ4"]', '"MQ4"', "formats is not a list of block formats"),
        ('["MQ4"]', "[]", "formats is not a list of block formats"),
        ('way_out = "take another"', "", "way_out is missing"),
        ('way_out = "take another"', 'way_oout = "take another"', "unknown key way_oout"),
        ('what = "it is wrong"', 'what = "it is wrong"\ncolumns = "under 3"', "columns is 'under 3'"),
    ],
)
def test_what_is_no_fact_is_refused(before: str, after: str, problem: str) -> None:
    with pytest.raises(EngineFactError, match=r"engine\.toml") as e:
        parse_facts(FACT.replace(before, after), "engine.toml")
    assert problem in str(e.value)


def test_every_format_has_its_place_and_runs_where_the_rules_allow_it() -> None:
    for projection in get_args(Projection):
        for fmt in BY_NAME.values():
            states = {f.state for f in engine_facts() if f.concerns(projection, fmt.name, 1024)}
            if fmt.quant_type in EXPERT_FORMATS:
                assert "runs" in states and "fails" not in states
            else:
                assert "runs" not in states


def expert(projection: str, fmt: str, columns: int) -> tuple[TensorSpec, int]:
    spec = TensorSpec(expert_name(0, 0, projection), (256, columns), "fp8", "expert", 0, 0, projection)
    return spec, BY_NAME[fmt].quant_type


@pytest.mark.parametrize(
    ("projection", "fmt", "columns", "states"),
    [
        ("w2", "MQ4", 1536, ["wrong"]),
        ("w2", "MQ4", 512, []),
        ("w2", "MQ6", 1536, []),
        ("w2", "MQ3-Lloyd", 1536, []),
        ("w2", "MQ4-Lloyd", 1536, ["fails"]),
        ("w1", "MQ4", 3072, []),
        ("w3", "MQ4", 512, ["wrong"]),
        ("w1", "MQ3-Lloyd", 3072, ["slow"]),
        ("w1", "MQ2-Lloyd", 3072, []),
    ],
)
def test_what_a_user_meets(projection: str, fmt: str, columns: int, states: list[str]) -> None:
    assert [fact.state for fact in concerns([expert(projection, fmt, columns)])] == states


def test_each_fact_is_told_once_the_worst_first_and_other_tensors_do_not_matter() -> None:
    experts = [expert("w1", "MQ3-Lloyd", 3072), expert("w2", "MQ4", 1536), expert("w2", "MQ4", 1536)]
    other = TensorSpec("x", (256, 1536), "bf16", "attn"), BY_NAME["MQ4"].quant_type
    unknown = experts[0][0], 99
    assert [fact.state for fact in concerns([*experts, other, unknown])] == ["wrong", "slow"]
    assert concerns([other, unknown]) == ()


def test_a_warning_names_the_versions_the_fault_and_the_way_out() -> None:
    (fact,) = concerns([expert("w2", "MQ4", 1536)])
    for part in ("since 11 July 2026", "22 August 2026", "down in MQ4", "512 columns", "older", "MQ6"):
        assert part in fact.warning
    assert "ec9ec35e" in fact.source


@pytest.mark.parametrize(
    ("since", "until", "said"),
    [
        (None, None, "every hipfire version that was looked at"),
        (None, datetime.date(2026, 9, 1), "hipfire before 1 September 2026"),
        (
            datetime.date(2026, 7, 11),
            datetime.date(2026, 9, 1),
            "hipfire from 11 July 2026 until 1 September 2026",
        ),
    ],
)
def test_ranges_of_versions_in_words(
    since: datetime.date | None, until: datetime.date | None, said: str
) -> None:
    seen = datetime.date(2026, 8, 22)
    assert EngineFact("down", ("MQ4",), "wrong", seen, "x", "y", since, until, "any", "z").when == said


def test_the_page_on_the_engine_tells_every_fact_that_warns() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    for fact in engine_facts():
        if fact.state in WARNED:
            assert fact.what in page and fact.source in page
