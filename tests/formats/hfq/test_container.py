"""The HFQ container: broken files first, then round trips."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.blocks import FORMATS
from mq_quant.formats.errors import HfqError, HfqKind
from mq_quant.formats.hfq import (
    HfqFile,
    QuantizationHash,
    TensorEntry,
    TensorMeta,
    layout,
    open_hfq,
    quantization_hash,
    write_hfq,
)
from mq_quant.formats.hfq.layout import COUNT_LIMIT, METADATA_LIMIT

GOLDEN = Path(__file__).parents[2] / "golden" / "container.hfq"
BYTES = GOLDEN.read_bytes()


def entry_line(
    name: bytes = b"t",
    quant_type: int = 1,
    dims: tuple[int, ...] = (8,),
    group: int = 0,
    size: int = 16,
    n_dims: int | None = None,
) -> bytes:
    head = struct.pack("<H", len(name)) + name
    kind = bytes([quant_type, len(dims) if n_dims is None else n_dims])
    return head + kind + struct.pack(f"<{len(dims)}I", *dims) + struct.pack("<IQ", group, size)


def raw_file(
    *lines: bytes,
    metadata: bytes = b"{}",
    count: int | None = None,
    index_count: int | None = None,
    payload: bytes = bytes(16),
    data_offset: int | None = None,
    metadata_offset: int = 32,
    version: int = 1,
    padding: bytes | None = None,
) -> bytes:
    """A file assembled field by field, so that each field can lie."""
    n = len(lines)
    index = struct.pack("<I", n if index_count is None else index_count) + b"".join(lines)
    used = 32 + len(metadata) + len(index)
    fill = bytes(-used % 4096) if padding is None else padding
    offset = used + len(fill) if data_offset is None else data_offset
    count = n if count is None else count
    header = struct.pack("<4sIIIQQ", b"HFQM", version, 10, count, metadata_offset, offset)
    return header + metadata + index + fill + payload


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with HFQM"),
    "other magic": (b"GGUF" + BYTES[4:], "does not begin with HFQM"),
    "header only": (BYTES[:20], "ends inside its header"),
    "version": (raw_file(entry_line(), version=2), "version 2"),
    "metadata_offset": (raw_file(entry_line(), metadata_offset=40), "metadata_offset is 40"),
    "data_offset past the end": (raw_file(entry_line(), data_offset=1 << 63), "payloads begin"),
    "data_offset inside the header": (raw_file(entry_line(), data_offset=16), "no end within 0"),
    "data_offset inside the index": (raw_file(entry_line(), data_offset=40), "ends|reach|fit"),
    "metadata without end": (raw_file(entry_line(), metadata=b'{"a":"'), "no end"),
    "metadata is a list": (raw_file(entry_line(), metadata=b"[1]"), "begin with"),
    "metadata is no JSON": (raw_file(entry_line(), metadata=b"{a}"), "not JSON"),
    "metadata repeats a key": (
        raw_file(entry_line(), metadata=b'{"a":1,"b":1,"a":2}'),
        "repeats the key 'a'",
    ),
    "metadata holds NaN": (raw_file(entry_line(), metadata=b'{"a":NaN}'), "NaN"),
    "metadata is not UTF-8": (raw_file(entry_line(), metadata=b'{"a":"\xff"}'), "UTF-8"),
    "metadata has a lone surrogate": (raw_file(entry_line(), metadata=rb'{"a":"\ud800"}'), "surrogate"),
    "deep objects": (raw_file(entry_line(), metadata=b'{"a":' * 5000 + b"1" + b"}" * 5000), "deeper"),
    "deep arrays": (raw_file(entry_line(), metadata=b'{"a":' + b"[" * 90000 + b"]" * 90000 + b"}"), "deeper"),
    "huge number": (raw_file(entry_line(), metadata=b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "counts differ": (raw_file(entry_line(), index_count=2), "header counts 1"),
    "count beyond the file": (raw_file(entry_line(), count=2**32 - 1, index_count=2**32 - 1), "do not fit"),
    "name beyond the file": (raw_file(b"\xff\xff" + bytes(40)), "ends inside its index"),
    "name is not UTF-8": (raw_file(entry_line(b"\xff\xfe")), "not UTF-8"),
    "name is empty": (raw_file(entry_line(b"")), "name is empty"),
    "name holds a line break": (raw_file(entry_line(b"a\nb")), "cannot be printed"),
    "name repeats": (raw_file(entry_line(), entry_line(), payload=bytes(32)), "twice"),
    "dims beyond the index": (raw_file(entry_line(n_dims=255)), "ends inside|reaches|dimensions|shape"),
    "dim of zero": (raw_file(entry_line(dims=(0,), size=0), payload=b""), "shape"),
    "size 2^63": (raw_file(entry_line(quant_type=99, size=1 << 63)), "out of range"),
    "sizes that overflow": (
        raw_file(*(entry_line(b"%d" % i, quant_type=99, size=(1 << 63) - 1) for i in range(4))),
        "the file has",
    ),
    "size against shape": (raw_file(entry_line(size=14), payload=bytes(14)), "takes 16"),
    "group_size of another format": (raw_file(entry_line(group=32)), "group_size is 32"),
    "row of half a group": (
        raw_file(entry_line(quant_type=13, dims=(2, 128), group=256, size=136)),
        "whole groups",
    ),
    "payload truncated": (raw_file(entry_line(), payload=bytes(15)), "the file has"),
    "number beyond all": (raw_file(entry_line(), metadata=b'{"a":-1e999}'), "beyond every float"),
    "other version": (raw_file(entry_line(), version=7), "version 7; mq-quant reads version 1"),
    "huge dimensions": (raw_file(entry_line(dims=(2**32 - 1,) * 8)), "takes"),
    "nine dimensions": (raw_file(entry_line(dims=(1,) * 9)), "up to 8 dimensions"),
    "index reaches into the payloads": (
        raw_file(entry_line(b"n" * 4000), metadata=b"{}", data_offset=400),
        "reaches into the payloads",
    ),
    "padding not zero": (raw_file(entry_line(), padding=b"\0\1"), "not zero"),
}


KIND: dict[str, HfqKind] = {
    "empty": HfqKind.NOT_HFQ,
    "other magic": HfqKind.NOT_HFQ,
    "header only": HfqKind.TRUNCATED,
    "version": HfqKind.VERSION,
    "other version": HfqKind.VERSION,
    "metadata_offset": HfqKind.METADATA_OFFSET,
    "data_offset past the end": HfqKind.DATA_OFFSET,
    "data_offset inside the header": HfqKind.METADATA_ENDLESS,
    "data_offset inside the index": HfqKind.TOO_MANY,
    "metadata without end": HfqKind.METADATA_ENDLESS,
    "counts differ": HfqKind.COUNTS,
    "count beyond the file": HfqKind.TOO_MANY,
    "name beyond the file": HfqKind.TRUNCATED,
    "name is not UTF-8": HfqKind.NAME_ENCODING,
    "name is empty": HfqKind.NAME,
    "name holds a line break": HfqKind.NAME,
    "name repeats": HfqKind.NAME_TWICE,
    "dims beyond the index": HfqKind.SHAPE,
    "dim of zero": HfqKind.SHAPE,
    "nine dimensions": HfqKind.SHAPE,
    "size 2^63": HfqKind.FIELD,
    "sizes that overflow": HfqKind.PAYLOAD_END,
    "size against shape": HfqKind.PAYLOAD_SIZE,
    "huge dimensions": HfqKind.PAYLOAD_SIZE,
    "group_size of another format": HfqKind.GROUP_SIZE,
    "row of half a group": HfqKind.GROUPS,
    "payload truncated": HfqKind.PAYLOAD_END,
    "padding not zero": HfqKind.PADDING,
    "index reaches into the payloads": HfqKind.INDEX_END,
}
"""The kind of each refusal above; what is not listed is METADATA_JSON."""


def written(folder: Path, data: bytes) -> Path:
    path = folder / "x.hfq"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    data, text = REFUSED[case]
    with pytest.raises(HfqError, match=text) as e:
        open_hfq(written(tmp_path, data))
    assert "x.hfq" in str(e.value)
    assert e.value.kind is KIND.get(case, HfqKind.METADATA_JSON)


def test_every_kind_is_asserted_by_name_in_some_test() -> None:
    folder = Path(__file__).parents[2]
    text = "".join(path.read_text("utf-8") for path in sorted(folder.rglob("test_*.py")))
    assert [kind.name for kind in HfqKind if f"HfqKind.{kind.name}" not in text] == []


def test_what_the_broken_files_are_broken_from(tmp_path: Path) -> None:
    with open_hfq(written(tmp_path, raw_file(entry_line()))) as f:
        assert f.entries == (TensorEntry("t", 1, (8,), 0, 16, 4096),)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = written(tmp_path, BYTES)
    lengths = [*range(700), *range(700, 4096, 97), *range(4096, len(BYTES))]
    for length in reversed(lengths):
        os.truncate(path, length)
        with pytest.raises(HfqError):
            open_hfq(path)


def test_every_header_and_index_byte_counts(tmp_path: Path) -> None:
    """No byte of header, index or padding can change without the reader seeing a different file or refusing it."""
    with open_hfq(GOLDEN) as f:
        skip = range(32, 32 + len(f.metadata_bytes))
        original = (f.version, f.arch_id, f.entries, f.data_offset)
    for at in [i for i in range(420) if i not in skip]:
        changed = bytearray(BYTES)
        changed[at] ^= 1
        try:
            with open_hfq(written(tmp_path, bytes(changed))) as f:
                assert (f.version, f.arch_id, f.entries, f.data_offset) != original
        except HfqError:
            pass


def test_metadata_without_end_stops_at_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "x.hfq"
    with path.open("wb") as f:
        f.write(struct.pack("<4sIIIQQ", b"HFQM", 1, 10, 0, 32, METADATA_LIMIT * 4) + b'{"a":"')
        f.truncate(METADATA_LIMIT * 4)
    with pytest.raises(HfqError, match=f"no end within {METADATA_LIMIT}") as e:
        open_hfq(path)
    assert e.value.kind is HfqKind.METADATA_ENDLESS


def test_padding_and_index_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, raw_file(entry_line(), data_offset=METADATA_LIMIT + 8192))
    os.truncate(path, METADATA_LIMIT + 8192 + 16)
    with pytest.raises(HfqError, match="unused bytes") as e:
        open_hfq(path)
    assert e.value.kind is HfqKind.PADDING_SIZE
    monkeypatch.setattr("mq_quant.formats.hfq.container.INDEX_LIMIT", 20)
    with pytest.raises(HfqError, match="index takes more than 20 bytes") as e:
        open_hfq(written(tmp_path, raw_file(entry_line(b"some name"))))
    assert e.value.kind is HfqKind.INDEX_SIZE


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(HfqError, match="is not a plain file") as e:
            open_hfq(path)
        assert e.value.kind is HfqKind.UNOPENABLE


def test_missing_file_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(HfqError, match="cannot be opened") as e:
        open_hfq(tmp_path / "none.hfq")
    assert e.value.kind is HfqKind.UNOPENABLE
    with pytest.raises(HfqError, match=r"cannot be opened|reading failed"):
        open_hfq(tmp_path)
    with open_hfq(GOLDEN) as f:
        assert "nowhere" not in f
        with pytest.raises(HfqError, match="no such tensor") as e:
            f.read("nowhere")
        assert e.value.kind is HfqKind.NO_TENSOR


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = written(tmp_path, BYTES)
    with open_hfq(path) as f:
        os.truncate(path, 4200)
        with pytest.raises(HfqError, match="ended inside") as e:
            f.read(f.entries[-1].name)
        assert e.value.kind is HfqKind.CHANGED


def test_a_fault_of_the_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with open_hfq(GOLDEN) as f:
        monkeypatch.setattr("mq_quant.formats.hfq.container.os.preadv", fails)
        with pytest.raises(HfqError, match="reading failed: Input/output error") as e:
            f.read(f.entries[0].name)
    assert e.value.kind is HfqKind.UNREADABLE


def test_bytes_after_the_last_tensor_are_let_through_and_counted(tmp_path: Path) -> None:
    rest = b'{"overlay": 1}' * 9
    with open_hfq(written(tmp_path, BYTES + rest)) as f, open_hfq(GOLDEN) as plain:
        assert f.trailing_bytes == len(rest)
        assert b"".join(part.tobytes() for part in f.trailing(10)) == rest
        assert f.entries == plain.entries
        assert all(np.array_equal(f.read(e.name), plain.read(e.name)) for e in plain.entries)
        assert plain.trailing_bytes == 0
        assert list(plain.trailing()) == []
        os.truncate(tmp_path / "x.hfq", len(BYTES) + 3)
        with pytest.raises(HfqError, match="after its payloads after it was opened"):
            list(f.trailing())


def test_read_range_stays_inside_its_tensor() -> None:
    with open_hfq(GOLDEN) as f:
        entry = f.entries[1]
        whole = f.read(entry.name)
        assert np.array_equal(f.read_range(entry, 10, 20), whole[10:20])
        assert np.array_equal(np.concatenate(list(f.chunks(entry, 7))), whole)
        for start, stop in ((-1, 4), (4, 2), (0, entry.nbytes + 1)):
            with pytest.raises(ValueError, match="not inside"):
                f.read_range(entry, start, stop)


def copy(source: HfqFile, path: Path, metadata: object) -> bytes:
    pairs = [(e, source.read(e.name)) for e in source.entries]
    write_hfq(path, metadata, pairs, source.arch_id)  # type: ignore[arg-type]
    return path.read_bytes()


def test_golden_round_trip(tmp_path: Path) -> None:
    with open_hfq(GOLDEN) as f:
        assert f.metadata["config"]["note"] == 'braces } { and "quotes" inside a string'
        assert f.entries[0].name == "model.norm.weight"
        assert copy(f, tmp_path / "raw.hfq", f.metadata_bytes) == BYTES
        assert copy(f, tmp_path / "parsed.hfq", f.metadata) == BYTES


def test_golden_hash_is_the_stated_recipe() -> None:
    """The hash spelled out a second time, with struct alone."""
    stream = b"hipfire-hfq-quantized-tensor-payload-v1"
    with open_hfq(GOLDEN) as f:
        for e in f.entries:
            name = e.name.encode()
            stream += struct.pack("<Q", len(name)) + name + struct.pack("<BQ", e.quant_type, len(e.shape))
            stream += b"".join(struct.pack("<I", d) for d in e.shape)
            stream += struct.pack("<IQ", e.group_size, e.nbytes) + f.read(e.name).tobytes()
        digest = QuantizationHash()
        for e in f.entries:
            digest.update(e, f.chunks(e, 100))
        assert quantization_hash(f) == digest.hexdigest == xxhash.xxh64(stream).hexdigest()
    record = digest.record("mq-quant")
    assert record["value"] == digest.hexdigest
    assert (record["tensor_count"], record["payload_bytes"]) == (3, len(BYTES) - 4096)


def test_hash_refuses_short_payloads() -> None:
    with pytest.raises(HfqError, match="3 bytes were hashed of 4") as e:
        QuantizationHash().update(TensorMeta("a", 2, (1,), 0, 4), [b"ab", b"c"])
    assert e.value.kind is HfqKind.LENGTH


def test_unaligned_data_offset_is_read(tmp_path: Path) -> None:
    with open_hfq(written(tmp_path, raw_file(entry_line(), padding=bytes(3), payload=bytes(range(16))))) as f:
        assert f.data_offset % 4096
        assert f.read("t").tobytes() == bytes(range(16))


@pytest.mark.parametrize("size", [(1 << 20) - 33, (1 << 20) - 32, (1 << 20) - 31, (1 << 20) + 5])
def test_metadata_across_chunks(size: int, tmp_path: Path) -> None:
    """Strings and escapes that lie across the boundary of two reads do not confuse the scan."""
    text = ('\\"}{' * size)[: size // 2] + '}"\\'
    write_hfq(tmp_path / "x.hfq", {"a": text, "b": {"c": "{"}}, [])
    with open_hfq(tmp_path / "x.hfq") as f:
        assert f.metadata == {"a": text, "b": {"c": "{"}}


WRITER_REFUSES: dict[str, Callable[[], object]] = {
    "metadata beyond the limit": lambda: layout({"a": "x" * METADATA_LIMIT}, []),
    "more tensors than an index holds": lambda: layout(
        {}, [TensorMeta("a", 2, (1,), 0, 4)] * (COUNT_LIMIT + 1)
    ),
    "payload of another length": lambda: write_hfq(
        "/nonexistent/x", {}, [(TensorMeta("a", 2, (1,), 0, 4), b"")]
    ),
    "folder that is not there": lambda: write_hfq("/nonexistent/x", {}, []),
    "repeated name": lambda: layout({}, [TensorMeta("a", 2, (1,), 0, 4)] * 2),
    "dimension of 2^32": lambda: layout({}, [TensorMeta("a", 99, (1 << 32,), 0, 4)]),
    "quant_type of 256": lambda: layout({}, [TensorMeta("a", 256, (1,), 0, 4)]),
    "metadata with NaN": lambda: layout({"a": float("nan")}, []),
    "metadata of bytes": lambda: layout({"a": b""}, []),
    "metadata with a lone surrogate": lambda: layout({"a": "\ud800"}, []),
    "raw metadata in spaces": lambda: layout(b" {} ", []),
    "raw metadata with a tail": lambda: layout(b"{}{}", []),
    "size against shape": lambda: layout({}, [TensorMeta("a", 2, (2,), 0, 4)]),
}


WRITER_KIND = {
    "metadata beyond the limit": HfqKind.METADATA_SIZE,
    "more tensors than an index holds": HfqKind.TOO_MANY,
    "payload of another length": HfqKind.LENGTH,
    "folder that is not there": HfqKind.UNWRITABLE,
    "repeated name": HfqKind.NAME_TWICE,
    "dimension of 2^32": HfqKind.SHAPE,
    "quant_type of 256": HfqKind.FIELD,
    "size against shape": HfqKind.PAYLOAD_SIZE,
}
"""The kind of each refusal above; what is not listed is METADATA_JSON."""


@pytest.mark.parametrize("case", WRITER_REFUSES)
def test_writer_refuses(case: str) -> None:
    with pytest.raises(HfqError) as e:
        WRITER_REFUSES[case]()
    assert e.value.kind is WRITER_KIND.get(case, HfqKind.METADATA_JSON)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.hfq").mkdir()
    with pytest.raises(HfqError, match="cannot be written"):
        write_hfq(tmp_path / "x.hfq", {}, [])
    assert [p.name for p in tmp_path.iterdir()] == ["x.hfq"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('{}"\\ab', max_size=4), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[TensorMeta, bytes]]:
    names = draw(
        st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=9), unique=True)
    )
    out = []
    for name in names[:4]:
        fmt = draw(st.sampled_from(list(FORMATS.values())))
        rows, cols = draw(st.integers(1, 3)), fmt.group * draw(st.integers(1, 2))
        size = fmt.nbytes(rows * cols)
        data = draw(st.binary(min_size=1, max_size=8)) * size
        out.append((TensorMeta(name, fmt.quant_type, (rows, cols), fmt.group_size, size), data[:size]))
    return out


@given(st.dictionaries(st.text('{}"\\ü', max_size=4), json_values, max_size=4), tensors())
@settings(deadline=None, max_examples=60)
def test_round_trip(metadata: dict[str, object], pairs: list[tuple[TensorMeta, bytes]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.hfq"
        plan = write_hfq(path, metadata, pairs)
        assert path.stat().st_size == plan.total_bytes
        with open_hfq(path) as f:
            assert f.metadata == json.loads(json.dumps(metadata))
            assert f.entries == plan.entries
            assert all(f.read(m.name).tobytes() == data for m, data in pairs)
            assert copy(f, Path(folder) / "again.hfq", f.metadata_bytes) == path.read_bytes()


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    path = written(tmp_path, raw_file(entry_line(), data_offset=METADATA_LIMIT + 8192))
    os.truncate(path, METADATA_LIMIT + 8192 + 16)
    with pytest.raises(HfqError, match="fetch or build it again"):
        open_hfq(path)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(HfqError, match="does not begin with HFQM") as e:
        open_hfq(path)
    assert e.value.hint is None
    path = path.rename(tmp_path / "name.mq2.partial")
    with pytest.raises(HfqError, match="it is unfinished: run the command"):
        open_hfq(path)
