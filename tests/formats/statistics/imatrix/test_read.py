"""Imatrix files: hostile ones, ones of another model, then both kinds against each other."""

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.errors import ImatrixError
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.statistics.imatrix import (
    GGUF_NAMES,
    Imatrix,
    ImatrixEntry,
    check_imatrix,
    coverage,
    expert_entry,
    read_imatrix,
    write_imatrix,
)
from small_model import CONFIG

MODEL = parse_config(CONFIG)
EXPERTS = MODEL.num_local_experts
GATE0 = "blk.0.ffn_gate_exps.weight"


def entry(rows: int = EXPERTS, width: int = 256, seed: int = 0) -> ImatrixEntry:
    random = np.random.default_rng(seed)
    mean = random.lognormal(size=(rows, width)).astype(np.float32)
    return ImatrixEntry(mean, np.full(rows, 64.0))


def entries(**changes: ImatrixEntry | None) -> dict[str, ImatrixEntry]:
    """Statistics for every expert projection of the small model, some replaced or (None) left out."""
    whole = {
        f"blk.{layer}.{name}.weight": entry(seed=layer)
        for layer in range(MODEL.num_hidden_layers)
        for name in GGUF_NAMES.values()
    }
    return {n: e for n, e in (whole | changes).items() if e is not None}


def gguf(path: Path, content: dict[str, ImatrixEntry]) -> Path:
    write_imatrix(path, content, ["corpus-a", "corpus-b"], 7, 512)
    return path


def dat(path: Path, content: dict[str, ImatrixEntry], calls: int = 7, tail: bytes | None = None) -> Path:
    out = struct.pack("<i", len(content))
    for name, e in content.items():
        raw = name.encode()
        values = (e.sum2_mean * np.float32(calls)).astype("<f4").tobytes()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values) // 4) + values
    path.write_bytes(out + (struct.pack("<ii", 7, 6) + b"corpus" if tail is None else tail))
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], offset: int = 0, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


TYPE = key("general.type", 8, text("imatrix"))
PAIR = [tensor("a.in_sum2", [4, 2]), tensor("a.counts", [1, 2], 32)]


def raw_gguf(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: bytes = bytes(64),
) -> bytes:
    keys, tensors = [TYPE] if keys is None else keys, PAIR if tensors is None else tensors
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    body = head + b"".join(keys) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


def entry_dat(name: bytes = b"a", calls: int = 1, count: int = 2, values: int = 2) -> bytes:
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, count) + bytes(4 * values)


ONE = struct.pack("<i", 1)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "end of the file"),
    "JSON": (b'{"model_type": 1}' * 9, "where the number of entries should be"),
    "dat without entries": (struct.pack("<i", 0), "0 where the number of entries"),
    "dat of 2^31 entries": (struct.pack("<i", 2**31 - 1), "number of entries"),
    "dat with a name of 2^31": (ONE + struct.pack("<i", 2**31 - 1), "bytes in a name"),
    "dat with a negative name": (ONE + struct.pack("<i", -1), "bytes in a name"),
    "dat with a binary name": (ONE + entry_dat(b"\xff\xfe"), "is no name"),
    "dat with 2^31 values": (ONE + entry_dat(count=2**31 - 1), "values of a"),
    "dat without values": (ONE + entry_dat(count=0, values=0), "values of a"),
    "dat with negative calls": (ONE + entry_dat(calls=-5), "calls of a"),
    "dat with a repeated name": (struct.pack("<i", 2) + entry_dat() * 2, "twice"),
    "dat with a tail": (ONE + entry_dat() + struct.pack("<ii", 1, 1) + b"ab", "1 bytes follow"),
    "GGUF magic alone": (b"GGUF", "broken GGUF"),
    "GGUF version 1": (raw_gguf(version=1), "version 1"),
    "GGUF of the other byte order": (raw_gguf(version=3 << 24), "byte order"),
    "2^63 tensors": (raw_gguf(counts=(1 << 63, 1)), "tensors, more than"),
    "2^64-1 keys": (raw_gguf(counts=(2, 2**64 - 1)), "keys, more than"),
    "key of 2^63 bytes": (raw_gguf([struct.pack("<Q", 1 << 63)]), "bytes in a name"),
    "string of 2^63 bytes": (raw_gguf([key("a", 8, struct.pack("<Q", 1 << 63))]), "beyond the file"),
    "array of 2^60 bytes": (raw_gguf([key("a", 9, struct.pack("<IQ", 0, 1 << 60))]), "elements"),
    "array of a million bytes": (
        raw_gguf([TYPE, key("a", 9, struct.pack("<IQ", 0, 1 << 20) + bytes(1 << 20))]),
        "elements",
    ),
    "array of arrays": (raw_gguf([key("a", 9, struct.pack("<IQ", 9, 1 << 10) * 1000)]), "array of type 9"),
    "value of type 77": (raw_gguf([key("a", 77, b"")]), "unknown type 77"),
    "repeated key": (raw_gguf([TYPE, TYPE]), "Duplicate"),
    "repeated tensor": (raw_gguf(tensors=PAIR[:1] * 2), "duplicated"),
    "name is not UTF-8": (raw_gguf([struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 0) + b"a"]), "utf-8"),
    "name that steers a terminal": (raw_gguf(tensors=[tensor("\x1b[2J.in_sum2", [4])]), "cannot be printed"),
    "tensor of 2^40 dimensions": (raw_gguf(tensors=[text("a") + struct.pack("<I", 2**31)]), "dimensions"),
    "tensor of 2^128 values": (
        raw_gguf(tensors=[tensor("a.in_sum2", [1 << 63, 1 << 63])]),
        "beyond the file",
    ),
    "tensor whose size overflows to 0": (
        raw_gguf(tensors=[tensor("a.in_sum2", [1 << 32, 1 << 32])]),
        "beyond the file",
    ),
    "tensor at 2^63": (raw_gguf(tensors=[tensor("a.in_sum2", [4], 1 << 63)]), "beyond the file"),
    "tensor cut": (raw_gguf(data=bytes(30)), "broken GGUF"),
    "alignment of 3": (raw_gguf([TYPE, key("general.alignment", 4, struct.pack("<I", 3))]), "alignment"),
    "a model": (raw_gguf([key("general.type", 8, text("model"))]), "type 'model', not an imatrix"),
    "no type": (raw_gguf([]), "type None"),
    "no sums": (raw_gguf(tensors=[tensor("a.counts", [1])]), "no in_sum2"),
    "sums without counts": (raw_gguf(tensors=PAIR[:1]), "in_sum2 but no counts"),
    "sums of F16": (raw_gguf(tensors=[tensor("a.in_sum2", [4, 2], kind=1), PAIR[1]]), "not a filled F32"),
    "sums of nothing": (raw_gguf(tensors=[tensor("a.in_sum2", [0]), PAIR[1]]), "not a filled F32"),
    "three counts for two": (raw_gguf(tensors=[PAIR[0], tensor("a.counts", [1, 3], 32)]), "3 counts for 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str, tmp_path: Path) -> None:
    data, problem = BROKEN[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ImatrixError, match=problem) as e:
        read_imatrix(path)
    assert "x.gguf" in str(e.value)


def test_what_the_broken_files_are_broken_from(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(raw_gguf())
    assert read_imatrix(tmp_path / "a").entries["a"].sum2_mean.shape == (2, 4)
    (tmp_path / "b").write_bytes(ONE + entry_dat())
    assert read_imatrix(tmp_path / "b").entries["a"].sum2_mean.shape == (1, 2)


@pytest.mark.parametrize("write", [gguf, dat])
def test_truncated_anywhere(write: Callable[..., Path], tmp_path: Path) -> None:
    small = {"blk.0.attn_q.weight": entry(1, 4), "b": entry(2, 4)}
    path = write(tmp_path / "x", small)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = read_imatrix(path)
        except ImatrixError:
            continue
        # what may be missing is GGUF's final padding, or the legacy file's optional tail
        assert set(found.entries) == set(small)
        assert all(np.allclose(found.entries[n].sum2_mean.ravel(), small[n].sum2_mean.ravel()) for n in small)


def test_middle_dimension_of_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw_gguf(tensors=[tensor("a.in_sum2", [4, 1, 2]), PAIR[1]]))
    assert read_imatrix(tmp_path / "x").entries["a"].sum2_mean.shape == (2, 4)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match="cannot be read"):
        read_imatrix(tmp_path / "none")
    with pytest.raises(ImatrixError, match="cannot be read"):
        read_imatrix(tmp_path)


OTHER: dict[str, tuple[dict[str, ImatrixEntry], str]] = {
    "projection missing": (entries(**{GATE0: None}), f"{GATE0} is missing"),
    "another K": (
        entries(**{GATE0: entry(width=512)}),
        "3 matrices of 512 channels, the model 3 matrices of 256",
    ),
    "another number of experts": (entries(**{GATE0: entry(rows=4)}), "4 matrices of 256 channels"),
    "no coverage": (
        entries(**{GATE0: ImatrixEntry(entry().sum2_mean, np.zeros(EXPERTS))}),
        "data for none of its experts",
    ),
    "nothing finite": (
        entries(**{GATE0: ImatrixEntry(np.full((EXPERTS, 256), np.inf, np.float32), np.ones(EXPERTS))}),
        "data for none of its experts",
    ),
    "one layer too few": ({n: e for n, e in entries().items() if "blk.1" not in n}, "blk.1"),
    "no experts at all": ({"blk.0.attn_q.weight": entry(1)}, "missing"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_model(case: str, tmp_path: Path) -> None:
    content, problem = OTHER[case]
    with pytest.raises(ImatrixError, match=problem):
        check_imatrix(read_imatrix(gguf(tmp_path / "x", content)), MODEL)


def test_absurd_config_is_bounded(tmp_path: Path) -> None:
    absurd = replace(MODEL, num_hidden_layers=2**30)
    with pytest.raises(ImatrixError, match="and more"):
        check_imatrix(read_imatrix(gguf(tmp_path / "x", entries())), absurd)


def test_dat_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match="of 256 channels"):
        check_imatrix(read_imatrix(dat(tmp_path / "x", entries(**{GATE0: entry(width=255)}))), MODEL)


def test_gguf_round_trip_with_bad_values(tmp_path: Path) -> None:
    """inf, NaN and negative sums come through as they are; counts that are no counts become 0."""
    mean = entry(4).sum2_mean
    mean[0, :3] = np.inf, np.nan, -1
    counts = np.array([2.0, np.nan, -3.0, 0.0])
    found = read_imatrix(gguf(tmp_path / "x.dat", {GATE0: ImatrixEntry(mean, counts)})).entries[GATE0]
    assert found.counts.dtype == np.float64
    assert found.counts.tolist() == [2, 0, 0, 0]
    assert found.sum2_mean.dtype == np.float32
    assert np.array_equal(found.sum2_mean[0], mean[0], equal_nan=True)
    assert not found.sum2_mean[1:].any()


def test_coverage_counts_experts_with_data(tmp_path: Path) -> None:
    content = entries(**{GATE0: ImatrixEntry(entry().sum2_mean, np.array([5.0, 0.0, 5.0]))})
    imatrix = read_imatrix(gguf(tmp_path / "x", content))
    check_imatrix(imatrix, MODEL)
    assert coverage(imatrix, MODEL) == pytest.approx(1 - 1 / (EXPERTS * 6))


def test_header_facts(tmp_path: Path) -> None:
    a = read_imatrix(gguf(tmp_path / "a.dat", entries()))
    b = read_imatrix(dat(tmp_path / "b.gguf", entries()))
    assert (a.kind, a.datasets, a.chunk_count) == ("gguf", ("corpus-a", "corpus-b"), 7)
    assert (b.kind, b.datasets, b.chunk_count) == ("dat", ("corpus",), 7)
    assert len(a.sha256) == 64
    assert a.sha256 != b.sha256
    assert len(a.entries) == len(b.entries) == 6


def test_no_tail_and_no_datasets(tmp_path: Path) -> None:
    old = read_imatrix(dat(tmp_path / "a", entries(), tail=b""))
    assert (old.datasets, old.chunk_count) == ((), 0)
    write_imatrix(tmp_path / "b", entries(), [], 0, 512)
    assert not any(read_imatrix(tmp_path / "b").datasets)


def test_dat_splits_experts_and_sees_unused_ones(tmp_path: Path) -> None:
    """The legacy writer stores one constant, zero or one, for experts that saw no token."""
    mean = entry().sum2_mean
    mean[1] = 1
    imatrix = read_imatrix(dat(tmp_path / "x", entries(**{GATE0: ImatrixEntry(mean, np.ones(EXPERTS))})))
    whole = expert_entry(imatrix, 0, "w1")
    split = expert_entry(imatrix, 0, "w1", EXPERTS)
    assert whole is not None and whole.sum2_mean.shape == (1, EXPERTS * 256)
    assert split is not None and split.counts.tolist() == [7, 0, 7]
    assert not split.counted
    assert np.allclose(split.sum2_mean[[0, 2]], mean[[0, 2]], rtol=1e-6)
    assert not split.sum2_mean[1].any()
    assert expert_entry(imatrix, 9, "w1", EXPERTS) is None


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ImatrixError, match="cannot be written"):
        gguf(tmp_path / "x", entries())
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_round_trip(tmp_path_factory: Any, rows: int, width: int, seed: int) -> None:
    e = entry(rows, width, seed)
    path = gguf(tmp_path_factory.mktemp("im") / "x", {"a": e})
    found = read_imatrix(path).entries["a"]
    assert np.allclose(found.sum2_mean, e.sum2_mean, rtol=2e-7)
    assert np.array_equal(found.counts, e.counts)


@pytest.fixture
def trained() -> tuple[Imatrix, Imatrix]:
    root = os.environ.get("MQ_QUANT_MODELS")
    if not root:
        pytest.skip("MQ_QUANT_MODELS is not set")
    folder = Path(root) / "trained-tiny"
    return read_imatrix(folder / "imatrix.gguf"), read_imatrix(folder / "imatrix.dat")


def test_both_kinds_of_the_trained_model_agree(trained: tuple[Imatrix, Imatrix]) -> None:
    a, b = trained
    assert (a.kind, b.kind) == ("gguf", "dat")
    assert set(a.entries) == set(b.entries)
    for layer in range(4):
        for projection in GGUF_NAMES:
            x, y = expert_entry(a, layer, projection, 32), expert_entry(b, layer, projection, 32)
            assert x is not None and y is not None
            assert np.allclose(x.sum2_mean, y.sum2_mean, rtol=1e-6)
            assert np.array_equal(x.counts > 0, y.counts > 0)
    assert np.allclose(
        a.entries["blk.0.attn_output.weight"].sum2_mean,
        b.entries["blk.0.attn_output.weight"].sum2_mean,
        rtol=1e-6,
    )
