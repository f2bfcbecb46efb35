"""The engine's own splitting of texts: told where tokens differ, silent where they do not, and never a failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mq_quant.formats.engine_rules import SPLITTING
from mq_quant.formats.hfq import HfqFile
from mq_quant.formats.tokenizer import TextTokenizer
from mq_quant.quantize.tiny.tokenizer import tokenizer_json
from mq_quant.verify.stages.splitting import split_difference, split_notes


def tokenizer(pre_tokenizer: Any, merges: Sequence[tuple[str, str]] = ()) -> str:
    """The tiny tokenizer with another pre_tokenizer and further merges."""
    made = tokenizer_json(300)
    vocabulary = made["model"]["vocab"]
    for a, b in merges:
        made["model"]["merges"].append([a, b])
        vocabulary[a + b] = 1000 + len(vocabulary)
    return json.dumps({**made, "pre_tokenizer": pre_tokenizer})


def split(pattern: str) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [words, byte_level]}


def a_file(text: Any) -> HfqFile:
    return cast(HfqFile, SimpleNamespace(metadata={"tokenizer": text}, path=Path("a.mq2")))


DIGITS = [("1", "2"), ("12", "3"), ("123", "4"), ("4", "5")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12345", ["123", "45"]),
        ("it's DON'T", ["it", "'s", " DON", "'T"]),
        ("a  b", ["a", " ", " b"]),
        ("x+= 1\n\n\ny", ["x", "+=", " ", "1", "\n\n\n", "y"]),
        ("\t中文, né", ["\t中文", ",", " né"]),
    ],
)
def test_the_engine_splits_as_cl100k(text: str, words: list[str]) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    assert [word for word, _ in Split(Regex(SPLITTING), "isolated").pre_tokenize_str(text)] == words


def test_the_same_pattern_gives_no_warning() -> None:
    text = tokenizer(split(SPLITTING), DIGITS)
    assert split_difference(TextTokenizer(text, "a"), "12345 and it's 中文 7") is None
    assert split_notes(a_file(text)) == ()


def test_another_pattern_is_told_with_the_first_place() -> None:
    text = tokenizer(split(r"\p{N}|[^\p{N}]+"), DIGITS)
    found = split_difference(TextTokenizer(text, "a"), "so 12345 it is")
    assert found is not None and (found.different, found.first) == (5, "so 12345 it is")
    (note,) = split_notes(a_file(text))
    assert "pattern of its own" in note and "tokens come out otherwise" in note and "token ids" in note


def test_other_splits_that_give_the_same_tokens_do_not_matter() -> None:
    text = tokenizer(split(r"\p{N}|[^\p{N}]+"))
    assert split_difference(TextTokenizer(text, "a"), "so 12345 it is") is None


@pytest.mark.parametrize("text", [None, 3, {}])
def test_a_file_without_a_tokenizer_is_no_matter(text: Any) -> None:
    assert split_notes(a_file(text)) == ()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_told_and_does_not_end_the_stage(text: str) -> None:
    (note,) = split_notes(a_file(text))
    assert "cannot be told" in note
