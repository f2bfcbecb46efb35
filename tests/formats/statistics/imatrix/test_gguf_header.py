"""The bounded walk over GGUF headers: it accepts what the gguf package writes, and stops at the first lie."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from mq_quant.formats.statistics.imatrix.gguf_header import (
    ELEMENT_LIMIT,
    HEADER_LIMIT,
    GgufHeader,
    read_gguf_header,
)


def header(path: Path) -> GgufHeader:
    with path.open("rb") as f:
        return read_gguf_header(f, path.stat().st_size, "imatrix")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with a key of every type and tensors of one to four dimensions."""
    writer = GGUFWriter(tmp_path / "x.gguf", "imatrix")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "ü" * 100)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.strings", ["x", "", "yz"])
    for n in range(1, 5):
        writer.add_tensor(f"t{n}", np.zeros((2,) * n, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf"


def test_accepts_every_type(written: Path) -> None:
    header(written)


def test_refuses_every_cut_of_the_header(written: Path) -> None:
    whole = written.read_bytes()
    end = whole.index(b"t4") + 2 + 4 + 4 * 8 + 4 + 8
    header(written)
    for length in range(end):
        written.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            header(written)


def test_array_elements_add_up(tmp_path: Path) -> None:
    """Many arrays below the limit are together above it."""
    one = (
        struct.pack("<Q", 1)
        + b"%c"
        + struct.pack("<IIQ", 9, 0, ELEMENT_LIMIT // 2)
        + bytes(ELEMENT_LIMIT // 2)
    )
    keys = [one.replace(b"%c", name, 1) for name in (b"a", b"b", b"c")]
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + b"".join(keys))
    with pytest.raises(ValueError, match="arrays hold more than"):
        header(tmp_path / "x")


def test_a_model_is_told_by_its_type_whatever_else_is_in_its_header(tmp_path: Path) -> None:
    """A vocabulary has more entries than an imatrix may have; it is not walked through."""
    text = struct.pack("<Q", 12) + b"general.type" + struct.pack("<IQ", 8, 5) + b"model"
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 9, 9) + text + b"and what follows")
    found = header(tmp_path / "x")
    assert found.keys == {"general.type": "model"} and not found.tensors


def test_a_header_of_many_megabytes_is_not_held(tmp_path: Path) -> None:
    """Each name is short enough, and so is their number."""
    with (tmp_path / "x").open("wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 1, 2))
        f.write(struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 8, HEADER_LIMIT))
        f.seek(HEADER_LIMIT, 1)
        f.write(struct.pack("<Q", 1) + b"b" + struct.pack("<IB", 0, 0))
    with pytest.raises(ValueError, match="header is larger than"):
        header(tmp_path / "x")
