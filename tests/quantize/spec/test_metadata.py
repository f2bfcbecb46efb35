"""Metadata: late values never change its length, and reports that do not fit are an error and not a broken file."""

from __future__ import annotations

from typing import Any

import pytest
import small_model
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import OutputError
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.strictjson import dump_object
from mq_quant.quantize.spec.metadata import (
    LAYER_ROOM,
    Outcome,
    SideFiles,
    complete,
    parameter_counts,
    template,
    totals_of,
)
from mq_quant.quantize.spec.plan import plan_tensors
from mq_quant.quantize.spec.recipe import load_tier

CONFIG = parse_config(small_model.CONFIG)
TENSORS = plan_tensors(load_tier("mq3"), CONFIG)
TOTALS = totals_of(TENSORS)
SIDE = SideFiles(tokenizer='{"a": "}{"}', chat_template="{{ x }}")


def laid_out() -> dict[str, Any]:
    return template(small_model.CONFIG, SIDE, CONFIG, TOTALS, {"program": {"version": "1"}})


def outcome(reports: list[dict[str, Any]]) -> Outcome:
    return Outcome("0123456789abcdef", ["f" * 16] * len(TENSORS), reports)


@given(st.lists(st.dictionaries(st.text(max_size=8), st.floats(0, 1), max_size=3), max_size=4))
def test_the_length_never_changes(reports: list[dict[str, Any]]) -> None:
    before = laid_out()
    after = complete(before, outcome(reports))
    assert len(dump_object(after)) == len(dump_object(before))
    assert list(after) == list(before)
    assert after["mq_quant"]["layers"] == reports
    assert after["quantization_hash"]["value"] == "0123456789abcdef"
    assert after["tokenizer"] == SIDE.tokenizer


def test_reports_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(OutputError, match="more than the file's layout keeps"):
        complete(laid_out(), outcome([{"fallbacks": ["x" * 4 * LAYER_ROOM]}]))


@pytest.mark.parametrize("copy", ["older", [{"name": "default", "template": "older"}], None])
def test_the_chat_template_of_its_own_file_wins_over_a_copy_in_tokenizer_config(copy: object) -> None:
    """Other programs take chat_template.jinja, so the copy may be stale."""

    def embedded(file: str | None) -> object:
        side = SideFiles("{}", {"chat_template": copy}, None, file)
        return template(small_model.CONFIG, side, CONFIG, TOTALS, {})["tokenizer_config"]["chat_template"]

    assert embedded("newer") == "newer"
    assert embedded(None) == embedded("") == copy


def test_parameters_are_counted() -> None:
    counts = parameter_counts(CONFIG, TOTALS, skipped=10)
    experts = 2 * 3 * 3 * 256 * 256
    assert counts["moe"]["routed_expert_params"] == experts
    assert counts["moe"]["routed_expert_active_params"] == experts * 2 // 3
    assert counts["source_total_params"] == counts["total_params"] + 10
    assert counts["active_params"] == counts["total_params"] - experts // 3
    assert counts["quantized_params"] < counts["total_params"]
