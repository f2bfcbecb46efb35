"""The tokenizer of the tiny source: a byte-level BPE in the tokenizer.json layout, small enough to write by hand.

All 256 byte symbols come first, as readers of this format require, then merges that spell short pseudo-words (space,
consonant, vowel, consonant), then special tokens. Nothing here is trained, so it is the same on every machine.
"""

from __future__ import annotations

from typing import Any

from ...formats.tokenizer.vocabulary import byte_symbols

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONSONANTS = "bcdfghjklmnprstvw"
_VOWELS = "aeiou"


def _merges(count: int) -> list[tuple[str, str]]:
    space = byte_symbols()[0x20]
    starts = [(space, c) for c in _CONSONANTS]
    open_syllables = [(space + c, v) for c in _CONSONANTS for v in _VOWELS]
    closed = [(a + b, c) for c in _CONSONANTS for a, b in open_syllables]
    merges = [*starts, *open_syllables, *closed][:count]
    if len(merges) < count:
        raise ValueError(f"only {len(merges)} merges can be spelled, not {count}")
    return merges


def first_word(vocab_size: int) -> int:
    """The first token id that is a pseudo-word with a vowel; ids from here to `vocab_size - 3` are words."""
    return min(256 + len(_CONSONANTS), vocab_size - len(SPECIAL))


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """The whole tokenizer.json for `vocab_size` tokens: 256 bytes, merges, and the special tokens last."""
    merges = _merges(vocab_size - 256 - len(SPECIAL))
    tokens = [*byte_symbols(), *(a + b for a, b in merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(tokens) + i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
