"""A payload whose bytes are not those that were written is refused where it is read, by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from damaged import flip_bit
from mq_quant.formats.errors import HfqError, HfqKind, InputError
from mq_quant.formats.hfq import TensorMeta, open_hfq, write_hfq
from mq_quant.formats.hfq.checked import CheckedFile, PayloadCheck, payload_checks
from mq_quant.formats.unchanged import UnchangedFile

SIZES = {"first": 2000, "second": 10, "last": 5000}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "x.hfq")


def written(path: Path, **record: Any) -> Path:
    random = np.random.default_rng(0)
    tensors = [
        (TensorMeta(name, 1, (size // 2,), 0, size), random.integers(0, 256, size).astype(np.uint8))
        for name, size in SIZES.items()
    ]
    values = "".join(xxhash.xxh64(data.data).hexdigest() for _, data in tensors)
    write_hfq(path, {"mq_quant": {"checksums": {"values": values}}} | record, tensors)
    return path


@pytest.mark.parametrize("tensor", list(SIZES))
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("piece", [1, 7, 3000, 1 << 20])
def test_one_flipped_bit_is_found_by_whoever_reads_on(
    path: Path, tensor: str, place: float, piece: int
) -> None:
    flip_bit(path, tensor, int(place * (SIZES[tensor] - 1)))
    data = path.read_bytes()
    with open_hfq(path) as file:
        check = PayloadCheck(file)
        with pytest.raises(HfqError, match=f"{tensor}: its bytes are not those that were written") as e:
            for at in range(0, len(data), piece):
                check(data[at : at + piece])
    assert e.value.kind is HfqKind.CHECKSUM and e.value.file == str(path)
    with pytest.raises(HfqError, match="mq-quant verify lists every damaged tensor"):
        UnchangedFile(path, InputError).sha256(look=payload_checks(path))


@pytest.mark.parametrize("part", [(0, 1), (1990, 2000), (0, 2000)])
def test_a_part_of_a_damaged_payload_is_not_handed_out(path: Path, part: tuple[int, int]) -> None:
    flip_bit(path, "first", 1000)
    with CheckedFile(path) as file:
        for _ in range(2):
            with pytest.raises(HfqError, match="first: its bytes are not"):
                file.read_range(file.entry("first"), *part)
        assert file.read("last").nbytes == SIZES["last"]


def test_sound_payloads_are_what_they_are_unchecked(path: Path) -> None:
    plain = UnchangedFile(path, InputError).sha256()
    assert UnchangedFile(path, InputError).sha256(look=payload_checks(path)) == plain
    with CheckedFile(path) as file, open_hfq(path) as other:
        for entry in file.entries:
            np.testing.assert_array_equal(file.read_range(entry, 3, 9), other.read_range(entry, 3, 9))
            np.testing.assert_array_equal(file.read(entry.name), other.read(entry.name))


@pytest.mark.parametrize("checksums", [None, {}, {"values": "0" * 16}, {"values": 3}])
def test_a_file_without_checksums_is_read_as_it_is(checksums: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "x.hfq", mq_quant={"checksums": checksums})
    flip_bit(path, "first", 1000)
    with CheckedFile(path) as file:
        file.read("first")
    UnchangedFile(path, InputError).sha256(look=payload_checks(path))


def test_bytes_behind_the_last_payload_are_let_through(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")
    UnchangedFile(path, InputError).sha256(look=payload_checks(path))
