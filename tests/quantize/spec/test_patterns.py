"""Patterns of rules: what they find, and that no pattern takes long, whatever the name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.quantize.spec.patterns import LENGTH_LIMIT, matcher
from mq_quant.quantize.spec.recipe import load_tier, tiers

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.11.self_attn.q_norm.weight",
    "model.layers.61.block_sparse_moe.experts.255.w2.weight",
    "model.layers.7.block_sparse_moe.experts.3.w13.weight",
    "model.layers.7.block_sparse_moe.e_score_correction_bias",
    "lm_head.weight",
    "",
]
USUAL = [
    "w2",
    ".*",
    "^model",
    r"w[13]\.weight$",
    r"layers\.(0|61)\.",
    r"experts\.\d{1,2}\.",
    r"(?i)LAYERS\.[^1]\.",
    r"\bw2\b",
    "(?:q|k)_norm",
    "$",
    "^*model",
    "weight$+",
    r"\.[0-9_]+\.",
]


@pytest.mark.parametrize(
    "pattern", sorted({*USUAL, *(r.tensors for t in tiers() for r in load_tier(t).rules)})
)
def test_usual_patterns_find_what_python_finds(pattern: str) -> None:
    same = pattern.replace("^*", "").replace("$+", "$")  # Python repeats no anchor
    assert [matcher(pattern)(name) for name in NAMES] == [bool(re.search(same, name)) for name in NAMES]


parts = st.sampled_from(
    ["w", ".", "a|b", "[a-z0-9_.]", r"\d", "(", ")", "+", "*", "?", "{2,5}", "|", "^", "$", "!"]
)


@given(st.lists(parts, max_size=12).map("".join), st.sampled_from(NAMES))
@settings(deadline=None)
def test_a_pattern_is_refused_or_finds_what_python_finds(pattern: str, name: str) -> None:
    try:
        found = matcher(pattern)(name)
    except ValueError:
        return
    try:
        expected = re.compile(pattern)
    except re.error:  # RE2 takes repetitions of repetitions, which Python refuses
        return
    if not re.search(
        r"[+*?}][+*?{]", pattern
    ):  # a lazy or possessive repetition of Python is another one there
        assert found == bool(expected.search(name))


EXPONENTIAL = [
    r"^([a-z0-9_.]+)+\d!$",
    r"^(([a-z])+.)+[A-Z]([a-z])+!$",
    r"(a|a)*(e|e)*(.|.)*!",
    r"^(\w+\.?)*!$",
    "(.*)*" * 20 + "!",
    "(x?.?){30}!",
    ".*" * 100 + "!",
]


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_patterns_that_take_exponential_time_elsewhere_take_none_here(pattern: str) -> None:
    """All tensors of the real model are tried, which would not end otherwise."""
    matches = matcher(pattern)
    for layer in range(62):
        for expert in range(256):
            assert not matches(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight")


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("w2(", "is not a regular expression: missing \\)"),
        ("(?!w2)", "no look-around"),
        (r"(w)\1", "no back-references"),
        ("a{1001}", "repetition"),
        ("((a{30}){30}){30}", "repetition"),
        (r"(\pL|\pN){9}", "makes a program of .* steps"),
        ("(.?){300}", "makes a program of"),
        ("x" * (LENGTH_LIMIT + 1), "characters, more than"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_what_is_no_pattern_is_said(pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        matcher(pattern)
