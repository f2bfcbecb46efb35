"""Files of token ids: what two kinds of file may hold, and every other content refused with the file's name."""

from __future__ import annotations

import io
import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.errors import TokenError
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.calibrate.token_file import TEXT_LIMIT, read_token_file
from mq_quant.quantize.calibrate.tokens import check_tokens, read_tokens
from small_model import CONFIG

MODEL = parse_config(CONFIG)
IDS = np.arange(12).reshape(3, 4)


def npy(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, value, **options)
    return out.getvalue()


def header(text: str, version: bytes = b"\x01\x00", data: bytes = b"") -> bytes:
    raw = text.encode("latin1")
    return b"\x93NUMPY" + version + struct.pack("<H", len(raw)) + raw + data


def shape(value: str, descr: str = "'<i8'", order: str = "False") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {value}, }}\n", data=bytes(64))


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<u2", "u1", "<i8", "<u8", "i1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_integer_type_and_order(dtype: str, order: Any, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(npy(IDS.astype(dtype, order=order)))
    assert read_token_file(path).tolist() == IDS.tolist()
    assert read_token_file(path, 2).tolist() == IDS[:2].tolist()
    assert read_token_file(path, 9).tolist() == IDS.tolist()
    checked = check_tokens(read_token_file(path), MODEL, path)
    assert checked.dtype == np.int32 and checked.tolist() == IDS.tolist()


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """The rest of the file may even be missing, as in a download that still runs."""
    path = tmp_path / "ids.npy"
    whole = npy(np.zeros((1000, 64), np.int32))
    path.write_bytes(whole[: -990 * 64 * 4])
    assert read_token_file(path, 10).shape == (10, 64)
    with pytest.raises(TokenError, match="ends before that"):
        read_token_file(path, 11)


@pytest.mark.parametrize(
    "text",
    [
        "1 2 3\n4 5 6\n",
        "1 2 3\r\n4 5 6",
        "\n  1\t2 3  \n\n4 5 6\n\n",
        "\ufeff1 2 3\n4 5 6",
        "0001 2 3\n4 5 000000000006",
    ],
)
def test_text_with_one_sequence_on_each_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes(text.encode())
    assert read_token_file(path).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert read_tokens(path, MODEL).tolist() == [[1, 2, 3], [4, 5, 6]]


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is empty"),
    "blank lines": (b"\n \n\t\n", "it is empty"),
    "words": (b"1 2\nthree 4", "line 2 holds 'three'"),
    "a negative id": (b"1 2\n\n-3 4", "line 3 holds '-3'"),
    "decimals": (b"1.5 2", "line 1 holds '.5'"),
    "a list of JSON": (b"[1, 2]", r"line 1 holds '\[1,'"),
    "digits of other scripts": ("１ ２".encode(), "line 1 holds"),
    "underscores": (b"1_0 2", "line 1 holds '_0'"),
    "a number of a thousand digits": (b"1 " + b"9" * 1000, "line 1 holds '9999"),
    "unequal lines": (b"1 2 3\n4 5", "from 2 to 3 ids"),
    "UTF-16": ("1 2 3".encode("utf-16"), "line 1 holds"),
    "NUL bytes": (b"1 2\0 3", "line 1 holds"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "line 1 holds 'PK"),
    "a pickle": (b"\x80\x04K\x01.", "line 1 holds"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "pointer file of Git LFS"),
    "floats": (npy(np.ones((2, 2))), "float64"),
    "booleans": (npy(np.ones((2, 2), bool)), "bool"),
    "dates": (npy(np.zeros((2, 2), "M8[s]")), "datetime64"),
    "strings": (npy(np.array([["a"]])), "<U1"),
    "records": (npy(np.zeros((2, 2), [("a", "<i4")])), "not whole numbers"),
    "objects": (npy(np.array([[1, None]], object), allow_pickle=True), "without running code"),
    "three dimensions": (npy(np.ones((1, 2, 3), int)), r"the shape \[1, 2, 3\]"),
    "a single number": (npy(np.array(5)), r"the shape \[\]"),
    "no sequence": (npy(np.ones((0, 4), int)), r"the shape \[0, 4\]"),
    "empty sequences": (npy(np.ones((4, 0), int)), r"\[4, 0\]"),
    "the magic alone": (b"\x93NUMPY", "header is broken"),
    "a header of version 9": (b"\x93NUMPY\x09\x00\x10\x00" + bytes(16), "version"),
    "a header cut short": (npy(IDS)[:40], "header is broken"),
    "a header that is no expression": (header("{'descr': ["), "header is broken"),
    "a header that nests": (header("(" * 9000), "header is broken"),
    "a header that calls": (header("{'descr': __import__('os'), 'fortran_order': False, 'shape': ()}\n"), "broken"),
    "2^60 sequences": (shape(f"({1 << 60}, 4)"), "more than"),
    "2^2000 sequences": (shape(f"({1 << 2000}, 4)"), "more than"),
    "negative sequences": (shape("(-4, 4)"), r"the shape \[-4, 4\]"),
    "more than the file holds": (shape("(1000, 1000)"), "ends before that"),
    "arrays in the array": (shape("(4,)", "('<i8', (2,))"), "not whole numbers|broken"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_and_named(case: str, tmp_path: Path) -> None:
    data, problem = REFUSED[case]
    path = tmp_path / "ids.of.something"
    path.write_bytes(data)
    with pytest.raises(TokenError, match=problem) as caught:
        read_token_file(path)
    assert "ids.of.something" in str(caught.value) and "pickle" not in str(caught.value)


def test_a_text_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    with path.open("wb") as f:
        f.truncate(TEXT_LIMIT + 1)
    with pytest.raises(TokenError, match="is a text of more than"):
        read_token_file(path)


@pytest.mark.parametrize("value", [300, 2**64 - 1, 2**63])
def test_padding_of_other_tokenizers_is_outside_the_vocabulary(value: int, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(npy(np.array([[5, value, 3]], np.uint64)))
    with pytest.raises(TokenError, match=rf"ids\.npy: holds token {value}, outside the vocabulary of 300"):
        read_tokens(path, MODEL)


def test_ids_may_come_through_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(npy(IDS),))
    writer.start()
    try:
        assert read_token_file(path).tolist() == IDS.tolist()
    finally:
        writer.join()


@given(st.binary(max_size=80), st.integers(0, 120), st.booleans())
@settings(deadline=None, max_examples=300)
def test_no_content_leads_to_another_error(
    tmp_path_factory: Any, data: bytes, at: int, replace: bool
) -> None:
    path = tmp_path_factory.mktemp("ids") / "ids"
    whole = npy(IDS)
    path.write_bytes(data if replace else whole[:at] + data + whole[at + len(data) :])
    try:
        ids = read_token_file(path)
    except TokenError:
        return
    assert ids.dtype.kind in "iu" and ids.size
