"""Sizes as people write them, and what the engine leaves of a memory; anything else is refused with what to give."""

from __future__ import annotations

from decimal import Decimal

import pytest
from mq_quant.formats.errors import BudgetError
from mq_quant.formats.minimax import ModelConfig, parse_config
from mq_quant.quantize.fit.avoided import read_avoided
from mq_quant.quantize.fit.budget import Budget, read_budget, read_size, weights_of
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.recipe import load_model
from mq_quant.quantize.spec.running import run_bytes


@pytest.fixture(scope="module")
def m27() -> ModelConfig:
    return parse_config(model_files(load_model("minimax-m2.7")).config)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("79200000000B", 79_200_000_000),
        ("85.0GB", 85_000_000_000),
        (" 85 gb ", 85_000_000_000),
        ("0.1MB", 100_000),
        ("64GiB", 64 * 1024**3),
        ("1.5 kB", 1500),
        ("0.3B", 0),
        ("79.2GB", 79_200_000_000),
    ],
)
def test_sizes_are_exact(text: str, nbytes: int) -> None:
    assert read_size(text, "--size") == nbytes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("85", "it has no unit"),
        ("85,0GB", r"it is no size[^$]*with a point and no comma"),
        ("1e10", "it is no size"),
        ("85GX", "the unit 'GX' is not known"),
        ("85 GB of it", "it is no size"),
        ("-85GB", "it is no size"),
        ("nanGB", "it is no size"),
        ("1e9B", "it is no size"),
        ("", "it is no size"),
        ("٨٥GB", "it is no size"),
        ("9" * 50 + "GB", "it is no size"),
        ("85GB\x1b[31m", "it is no size"),
    ],
)
def test_other_texts_are_refused(text: str, why: str) -> None:
    with pytest.raises(BudgetError, match=why) as e:
        read_size(text, "--size")
    assert "96GB" in str(e.value) and "\x1b" not in str(e.value)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("96GB", "85GB", None, None), "--memory and --size all say"),
        ((None, "85GB", 2.9, None), "--size and --bits all say"),
        ((None, "85GB", None, 4096), "--context goes with --memory"),
        ((None, None, None, 4096), "--context goes with --memory"),
        (("96GB", None, None, 0), "no number of tokens"),
        ((None, None, float("nan"), None), "no number of bits"),
        ((None, None, float("inf"), None), "no number of bits"),
        ((None, None, -2.0, None), "no number of bits"),
    ],
)
def test_contradictions_are_refused(given: tuple[str, str, float, int], why: str) -> None:
    with pytest.raises(BudgetError, match=why):
        read_budget(*given)


def test_no_option_is_no_budget() -> None:
    assert read_budget(None, None, None, None) is None


def test_memory_is_what_a_tier_fits_in(m27: ModelConfig) -> None:
    budget = read_budget("96GB", None, None, None)
    assert budget is not None
    limit = budget.limit(m27)
    assert run_bytes(limit, m27) == 96 * 10**9
    shorter = read_budget("96GB", None, None, 4096)
    assert shorter is not None and shorter.limit(m27) > limit
    assert (budget.name, shorter.name) == ("memory-96gb", "memory-96gb-context-4096")


def test_memory_that_the_engine_takes_alone_is_refused(m27: ModelConfig) -> None:
    with pytest.raises(BudgetError, match=r"needs 3\.7 GB besides the file"):
        Budget("memory", Decimal(3 * 10**9), "3GB").limit(m27)
    with pytest.raises(BudgetError, match="more than the 12288 tokens"):
        Budget("memory", Decimal(96 * 10**9), "96GB", 12289).limit(m27)


def test_bits_count_the_whole_file(m27: ModelConfig) -> None:
    budget = read_budget(None, None, 2.9, None)
    assert budget is not None and budget.name == "bits-2.9"
    assert budget.limit(m27) == pytest.approx(2.9 * weights_of(m27) / 8, abs=1)
    assert 228e9 < weights_of(m27) < 230e9


def test_formats_are_avoided_everywhere_or_in_one_projection() -> None:
    assert read_avoided(["MQ4"]) == {("gate_up", "MQ4"), ("down", "MQ4")}
    assert read_avoided(["down:mq4", "gate_up:MQ3-Lloyd"]) == {("down", "MQ4"), ("gate_up", "MQ3-Lloyd")}
    for text in ("MQ5", "up:MQ4", "down:", ":MQ4", "", "MQ4-Lloyd", "Q8F16"):
        with pytest.raises(BudgetError, match="names no format that experts can have"):
            read_avoided([text])
