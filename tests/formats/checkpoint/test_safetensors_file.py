"""Shard headers against the safetensors library: what it writes is read, and what is read is where it says."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.checkpoint.safetensors_file import (
    ITEM_BYTES,
    TensorInfo,
    by_name,
    header_length,
    read_header,
    read_tensor,
)
from mq_quant.formats.errors import CheckpointError
from safetensors import safe_open
from safetensors.torch import save_file

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    st.booleans(),
)
def test_reads_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[str, list[int]]], with_metadata: bool
) -> None:
    path = tmp_path_factory.mktemp("s") / "x.safetensors"
    tensors = {
        name: torch.arange(torch.Size(shape).numel() * ITEM_BYTES[dtype], dtype=torch.uint8)
        .remainder(2)
        .view(DTYPES[dtype])
        .reshape(shape)
        for name, (dtype, shape) in wanted.items()
    }
    save_file(tensors, path, {"format": "pt"} if with_metadata else None)
    found = by_name([read_header(path)], path)
    with safe_open(path, "pt") as f:
        assert set(found) == set(f.keys())
        for name, info in found.items():
            part = f.get_slice(name)
            assert (info.dtype, list(info.shape)) == (part.get_dtype(), part.get_shape())
            expected = f.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
            assert read_tensor(path, info).tobytes() == expected.tobytes()


@pytest.mark.parametrize("head", [b"", b"\2\0\0", bytes(8), b"\1" + bytes(7), b"\xff" * 8])
def test_absurd_header_lengths(head: bytes) -> None:
    with pytest.raises(CheckpointError, match="header length is"):
        header_length(head, "x.safetensors")


def test_one_name_in_two_shards() -> None:
    shards = [[TensorInfo("a", "U8", (), shard, 8, 9)] for shard in ("x", "y")]
    with pytest.raises(CheckpointError, match="two shards, x and y"):
        by_name(shards, "model")


def test_reading_stops_where_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)
    path.write_bytes(bytes(20))
    with pytest.raises(CheckpointError, match="ends inside this tensor"):
        read_tensor(path, TensorInfo("a", "U8", (10,), path.name, 11, 21))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensor(path, TensorInfo("a", "U8", (10,), path.name, 10, 20))
