"""Tokenizers as files of others hold them: settings of training runs are switched off, and every fault is our error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats.errors import TokenError
from mq_quant.formats.tokenizer import TextTokenizer
from mq_quant.quantize.tiny.tokenizer import tokenizer_json

TEXT = " bab cab dab fab"
Change = Callable[[dict[str, Any]], Any]


def changed(*path: Any) -> Change:
    """A change that sets document[path[0]][…] to the last of `path`."""

    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-2]:
            target = target[key]
        target[path[-2]] = path[-1]

    return change


def opened(change: Change = lambda document: None) -> TextTokenizer:
    document = tokenizer_json(640)
    change(document)
    return TextTokenizer(json.dumps(document), "tokenizer.json")


PADDING = {
    "direction": "Left",
    "pad_to_multiple_of": 64,
    "pad_id": 3,
    "pad_type_id": 0,
    "pad_token": "<|end|>",
}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "change",
    [
        changed("truncation", TRUNCATION),
        changed("truncation", TRUNCATION | {"max_length": 0}),
        changed("truncation", TRUNCATION | {"stride": 9}),
        changed("truncation", TRUNCATION | {"strategy": "OnlySecond"}),
        changed("padding", PADDING | {"strategy": "BatchLongest"}),
        changed("padding", PADDING | {"strategy": {"Fixed": 64}}),
        changed("padding", PADDING | {"strategy": {"Fixed": 10**12}, "pad_to_multiple_of": 0}),
        changed("model", "dropout", 0.99),
    ],
)
def test_settings_of_a_training_run_are_switched_off(change: Change) -> None:
    plain, set_up = opened(), opened(change)
    for special in (False, True):
        assert set_up.ids(TEXT, special) == plain.ids(TEXT, special)
    assert set_up.encode(TEXT).ids.tolist() == plain.encode(TEXT).ids.tolist()


def bos_before(document: dict[str, Any]) -> None:
    token = {"id": "<|user|>", "ids": [638], "tokens": ["<|user|>"]}
    pieces = [{"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": {"<|user|>": token},
    }


def test_tokens_around_a_text_are_put_there_only_on_request() -> None:
    plain, tokenizer = opened(), opened(bos_before)
    assert tokenizer.ids(TEXT, True) == [638, *plain.ids(TEXT, True)]
    assert tokenizer.ids(TEXT, False) == tokenizer.encode(TEXT).ids.tolist() == plain.ids(TEXT, False)


def test_where_tokens_start_and_which_words_they_are_of() -> None:
    found = opened().encode("é bab<|end|> x")
    assert found.starts.tolist() == [0, 0, 1, 5, 12, 13]
    assert found.words[0] == found.words[1] != found.words[2] != found.words[3]
    assert found.ids[3] == 637


def precompiled(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def replaces_nothing(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}


def drop(key: str) -> Change:
    return lambda document: document.pop(key)


@pytest.mark.parametrize(
    "change",
    [
        precompiled,
        replaces_nothing,
        drop("model"),
        changed("model", "vocab", "Ġb", 2**32),
        changed("model", "merges", [["b", "nowhere"]]),
        changed("model", "type", "BPF"),
        changed("model", {"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0}}),
        changed("model", {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]]}),
        changed(
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        changed("model", "continuing_subword_prefix", "#####"),
    ],
)
def test_every_fault_of_a_tokenizer_is_one_error_that_names_the_file(
    change: Change, capfd: pytest.CaptureFixture[str]
) -> None:
    """Panics of the package's Rust code among them, which also print a stack to stderr."""
    with pytest.raises(TokenError, match=r"tokenizer\.json: the tokenizer cannot"):
        opened(change).encode("brown ö")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["a\ud800", "\udcff"])
def test_text_that_is_no_text_is_refused(text: str) -> None:
    with pytest.raises(TokenError, match="cannot encode the text"):
        opened().ids(text, True)


@pytest.mark.parametrize("ids", [[-1], [2**32], [2**70]])
def test_ids_that_are_none_are_refused(ids: list[int]) -> None:
    with pytest.raises(TokenError, match="cannot decode the tokens"):
        opened().decode(ids)
    assert opened().decode(opened().ids(TEXT, False)) == TEXT


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer file of Git LFS"),
    ],
)
def test_files_that_hold_none(raw: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(TokenError, match=rf"tokenizer\.json: .*{problem}"):
        TextTokenizer.open(path)
    with pytest.raises(TokenError, match="cannot be read"):
        TextTokenizer.open(tmp_path / "none.json")
