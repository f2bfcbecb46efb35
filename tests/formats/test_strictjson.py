"""Strict JSON: what is refused, and the brace scan against the parser."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.strictjson import (
    DEPTH_LIMIT,
    JsonError,
    ObjectScanner,
    dump_object,
    object_end,
    parse_object,
)

REFUSED: dict[bytes, str] = {
    b"": "not JSON",
    b" ": "not JSON",
    b"[]": "not a JSON object",
    b'"a"': "not a JSON object",
    b"{": "not JSON",
    b"{}{}": "not JSON",
    b"{} x": "not JSON",
    b'{"a":1,}': "not JSON",
    b"{'a':1}": "not JSON",
    b'{"a":}': "not JSON",
    b'{"a":]]][[[}': "not JSON",
    b'{"a":"\n"}': "not JSON",
    b'{"a":1,"a":1}': "repeats the key 'a'",
    b'{"b":{"a":1,"a":1}}': "repeats the key 'a'",
    b'{"a":NaN}': "NaN",
    b'{"a":-Infinity}': "Infinity",
    b'{"a":"\xc3"}': "UTF-8",
    b'{"a":"\xed\xa0\x80"}': "UTF-8",
    b'{"a":"\\udc00"}': "surrogate",
    b'{"a":"\\uDBFF"}': "surrogate",
    b'{"\\ud800":1}': "surrogate",
    b"\xef\xbb\xbf{}": "not JSON",
    b"\xff\xfe{\0}\0": "UTF-8",
    b'{"a":1e999}': "1e999.* beyond every float",
    b'{"a":[-1E400]}': "beyond every float",
    b'{"a":' + b"9" * 400 + b".5}": "beyond every float",
    b'{"a":' + b"9" * 400 + b"}": "a number of 400 digits",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "pointer file of Git LFS",
    b'{"a":' + b"[" * DEPTH_LIMIT + b"]" * DEPTH_LIMIT + b"}": f"deeper than {DEPTH_LIMIT} levels",
    b'{"a":' * (DEPTH_LIMIT + 1) + b"1" + b"}" * (DEPTH_LIMIT + 1): f"deeper than {DEPTH_LIMIT} levels",
    b'{"\x1b[2J":1,"\x1b[2J":1}'.replace(b"\x1b", b"\\u001b"): r"repeats the key '\\x1b\[2J'",
    b'{"a":' + b"1" * 5000 + b"}": "not JSON",
    b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}": "nests deeper",
    b'{"a":' * 10**5 + b"1" + b"}" * 10**5: "nests deeper",
}


@pytest.mark.parametrize("raw", REFUSED, ids=lambda r: repr(r)[:40])
def test_refused(raw: bytes) -> None:
    with pytest.raises(JsonError, match=REFUSED[raw]):
        parse_object(raw)


def test_escaped_pairs_are_characters() -> None:
    assert parse_object(rb'{"a":"\ud83d\ude00"}') == {"a": "\U0001f600"}


def test_large_numbers_that_files_do_hold_are_read() -> None:
    raw = b'{"model_max_length":1000000000000000019884624838656,"other":1e30,"small":1e-400}'
    assert parse_object(raw) == {
        "model_max_length": 1000000000000000019884624838656,
        "other": 1e30,
        "small": 0.0,
    }


def test_the_depth_that_is_asked_for() -> None:
    raw = b'{"a":[[{}]]}'
    assert parse_object(raw, 4) == {"a": [[{}]]}
    with pytest.raises(JsonError, match="deeper than 3 levels"):
        parse_object(raw, 3)


def test_depth_of_what_is_written_is_bounded() -> None:
    raw = b'{"a":' + b"[" * (DEPTH_LIMIT - 1) + b"]" * (DEPTH_LIMIT - 1) + b"}"
    assert dump_object(parse_object(raw)) == raw
    with pytest.raises(JsonError, match=f"deeper than {DEPTH_LIMIT} levels"):
        dump_object({"a": parse_object(raw)})


@pytest.mark.parametrize("filler", [b"[],", b'"",', b"{},"])
def test_zip_bombs_are_not_parsed(filler: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq_quant.formats.strictjson.TOKEN_LIMIT", 1000)
    raw = b'{"a":[' + filler * 2100 + b"1]}"
    with pytest.raises(JsonError, match="more than 1000 strings, objects and arrays"):
        object_end(raw)


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a', b'{"}"', b'{"\\"}'])
def test_objects_that_do_not_end(raw: bytes) -> None:
    assert object_end(raw) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])) | st.text('{}[]"\\'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('{}"\\x'), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text('{}"\\x'), values, max_size=4), st.binary(max_size=8), st.data())
@settings(deadline=None, max_examples=150)
def test_scan_finds_the_end_however_the_stream_is_cut(
    value: dict[str, Any], tail: bytes, data: st.DataObject
) -> None:
    raw = dump_object(value)
    assert parse_object(raw) == json.loads(raw) == value
    stream, scanner, end, at = raw + tail, ObjectScanner(), None, 0
    while end is None:
        assert at < len(stream)
        step = data.draw(st.integers(1, 7))
        end = scanner.feed(stream[at : at + step])
        at += step
    assert end == len(raw)


def test_a_byte_order_mark_is_called_by_its_name() -> None:
    with pytest.raises(JsonError, match="begins with a byte order mark"):
        parse_object(b"\xef\xbb\xbf{}")
