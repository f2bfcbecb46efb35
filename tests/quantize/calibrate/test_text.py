"""Texts that are tokenised in windows: the tokens are those of the whole text, whatever the tokenizer and the text."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.errors import TokenError
from mq_quant.formats.tokenizer import TextTokenizer
from mq_quant.quantize.calibrate.text import text_tokens
from mq_quant.quantize.tiny.tokenizer import tokenizer_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WINDOW, OVERLAP = 2000, 256
WORDS = [
    *("the", "buffer's", "2nd", "line;", "«größer»", "1234567", "x+=1", "日本語", "テキスト", "don't"),
    *("e\u0301", "🙂🙂", "\u00a0", "naïve", "___", "https://a.b/c?d"),
]


def prose(seed: int, words: int) -> str:
    """Words, numbers, signs and scripts in a random order, with white space of every kind between them."""
    choose = random.Random(seed)
    gaps = [" "] * 20 + ["\n", "\n\n", "  ", "\t", "    ", " \n ", "\r\n", "\u3000", ""]
    return "".join(choose.choice(WORDS) + choose.choice(gaps) for _ in range(words))


SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bpe(**parts: Any) -> Tokenizer:
    """A byte-level BPE, trained on some of the text, with the given parts."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in ({"pre_tokenizer": byte_level, "decoder": decoders.ByteLevel()} | parts).items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([prose(99, 3000)], trainer)
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.add_tokens(
        [AddedToken("buffer's 2nd", rstrip=True, normalized=False), AddedToken("x+=1", lstrip=True)]
    )
    tokenizer.add_special_tokens([AddedToken("🙂🙂"), AddedToken("line; ", single_word=True)])
    return tokenizer


def sequence(*parts: Any) -> Any:
    return pre_tokenizers.Sequence(list(parts))


def unigram(split: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]
    )
    tokenizer.train_from_iterator(prose(99, 2000).split("\n"), trainer)
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, ";": 2, "buffer": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "the tiny source's": lambda: Tokenizer.from_str(json.dumps(tokenizer_json(640))),
    "byte-level BPE": bpe,
    "as of this model family": lambda: bpe(
        pre_tokenizer=sequence(
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        )
    ),
    "a space before the text": lambda: bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "normalised": lambda: bpe(
        normalizer=normalizers.Sequence(
            [normalizers.NFC(), normalizers.Strip(), normalizers.Lowercase(), normalizers.Prepend("_")]
        )
    ),
    "without words": lambda: bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "with added tokens": with_added_tokens,
    "unigram": lambda: unigram(True),
    "unigram without words": lambda: unigram(False),
    "whole words": words,
}  # fmt: skip


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def ours(tokenizer: Tokenizer) -> TextTokenizer:
    return TextTokenizer(tokenizer.to_str(), "tokenizer.json")


def streamed(
    path: Path, tokenizer: TextTokenizer, window: int = WINDOW, overlap: int = OVERLAP
) -> list[list[int]]:
    return [part.tolist() for part in text_tokens(path, tokenizer, window, overlap)]


def joined(parts: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def whole(path: Path, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(path.read_text("utf-8"), add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_are_those_of_the_whole_text(tokenizer: Tokenizer, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(prose(seed, 6000).encode())
    parts = streamed(path, ours(tokenizer), WINDOW + 37 * seed)
    assert joined(parts) == whole(path, tokenizer)
    assert len(parts) > 10


AWKWARD = {
    "empty": "",
    "one letter": "a",
    "one long word": "a" * 30_000,
    "many digits": "1234567890" * 3000,
    "blanks": " " * 30_000,
    "blank lines": "\n" * 30_000,
    "blanks within": "word" + " " * 9000 + "another " * 3000,
    "a long word within": "word " * 2000 + "b" * 9000 + " word" * 2000,
    "one pattern": "ab" * 20_000,
    "nothing but signs of four bytes": "🙂" * 9000,
    "no blank at all": "日本語テキスト" * 4000,
    "the window's size": "word " * (WINDOW // 5),
    "the window's size and one": "word " * (WINDOW // 5) + "x",
    "marks that join what stands before": "e\u0301\u0323" * 9000,
}


@pytest.mark.parametrize("case", AWKWARD)
def test_texts_with_few_places_to_join(tokenizer: Tokenizer, case: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(AWKWARD[case], encoding="utf-8", newline="")
    assert joined(streamed(path, ours(tokenizer))) == whole(path, tokenizer)


@given(
    text=st.text(st.sampled_from("ab1. \n\t'é日🙂"), max_size=400),
    repeat=st.integers(1, 60),
    window=st.integers(600, 3000),
)
@settings(deadline=None, max_examples=60)
def test_any_text(tmp_path_factory: pytest.TempPathFactory, text: str, repeat: int, window: int) -> None:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(text * repeat, encoding="utf-8", newline="")
    for make in (TOKENIZERS["byte-level BPE"], words):
        made = CACHE.setdefault(make, make())
        assert joined(streamed(path, ours(made), window, 200)) == whole(path, made)


CACHE: dict[Any, Tokenizer] = {}


@pytest.fixture
def plain() -> TextTokenizer:
    return TextTokenizer(json.dumps(tokenizer_json(640)), "tokenizer.json")


def test_line_ends_and_the_byte_order_mark_are_no_text(plain: TextTokenizer, tmp_path: Path) -> None:
    path, text = tmp_path / "text", prose(1, 3000).replace("\r\n", "\n")
    path.write_bytes(text.encode())
    expected = joined(streamed(path, plain))
    for raw in (text.replace("\n", "\r\n"), text.replace("\n", "\r"), "\ufeff" + text):
        path.write_bytes(raw.encode())
        assert joined(streamed(path, plain)) == expected


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("at", [0, 1, 65_530, 65_536, 200_000])
@pytest.mark.parametrize("wrong", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88"])
def test_what_is_not_utf_8_is_told_with_its_offset(
    plain: TextTokenizer, at: int, wrong: bytes, mark: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    before = mark.encode() + ("ab é\n" * 50_000).encode()[:at].decode("utf-8", "ignore").encode()
    path.write_bytes(before + wrong + b" and more" * 10)
    with pytest.raises(TokenError, match=rf"text\.txt: is not UTF-8 text: .* at byte {len(before)}\n"):
        streamed(path, plain, 10_000)


def test_a_text_that_ends_within_a_character(plain: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("aé".encode()[:-1])
    with pytest.raises(TokenError, match="at byte 1"):
        streamed(tmp_path / "text", plain)


def test_utf_16_is_called_so(plain: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("hello".encode("utf-16"))
    with pytest.raises(TokenError, match="is UTF-16 text"):
        streamed(tmp_path / "text", plain)


def test_a_device_without_an_end_is_no_text(plain: TextTokenizer) -> None:
    with pytest.raises(TokenError, match="is a device"):
        streamed(Path("/dev/zero"), plain)


def test_an_endless_text_is_read_only_as_far_as_it_is_asked(plain: TextTokenizer, tmp_path: Path) -> None:
    """A pipe whose writer stops only when nobody reads any more."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as f, pytest.raises(BrokenPipeError):
            while True:
                f.write(b"a word and another one " * 1000)

    writer = threading.Thread(target=write)
    writer.start()
    parts = text_tokens(path, plain, WINDOW, OVERLAP)
    ids = np.concatenate([next(parts) for _ in range(20)])
    parts.close()
    writer.join()
    assert len(ids) > WINDOW


def test_a_text_whose_tokens_all_depend_on_each_other_is_refused(
    plain: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq_quant.quantize.calibrate.text.WINDOW_LIMIT", 20_000)
    (tmp_path / "text").write_text("".join(random.Random(0).choices("abc", k=100)) + " " * 50_000)
    with pytest.raises(TokenError, match="cannot be tokenised in parts"):
        for _ in text_tokens(tmp_path / "text", words_as_one(), WINDOW, OVERLAP):
            pass


def words_as_one() -> TextTokenizer:
    """A tokenizer for which a run of blanks is one token."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "contiguous")
    return ours(tokenizer)
