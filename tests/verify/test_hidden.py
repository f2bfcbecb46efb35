"""Hidden-state dumps: both magics are read, broken ones are refused, and comparison finds the layer that differs."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.errors import InputError, OutputError
from mq_quant.verify.hidden import HiddenError, HiddenWriter, compare_hidden, open_hidden

VALUES = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)


def write(path: Path, values: np.ndarray = VALUES) -> Path:
    with HiddenWriter(path, *values.shape) as writer:
        for layer in values:
            writer.add(layer)
    return path


def test_round_trip_and_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hfhs")
    assert path.read_bytes() == b"HFHS\0\0\0\0" + struct.pack("<4I", 3, 5, 8, 0) + VALUES.tobytes()
    dump = open_hidden(path)
    assert dump.shape == VALUES.shape
    for i, layer in enumerate(VALUES):
        np.testing.assert_array_equal(dump.layer(i), layer)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HiddenError, match="is not a plain file"):
        open_hidden(tmp_path / "pipe")


def test_reads_the_other_magic(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hfhs")
    path.write_bytes(b"HFHIDDEN" + path.read_bytes()[8:])
    np.testing.assert_array_equal(open_hidden(path).layer(2), VALUES[2])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw[:10], "not a hidden-state dump"),
        (lambda raw: b"HFHX" + raw[4:], "not a hidden-state dump"),
        (lambda raw: raw[:-1], "bytes, but"),
        (lambda raw: raw + b"\0", "bytes, but"),
        (lambda raw: raw[:8] + struct.pack("<4I", 2**32 - 1, 2**32 - 1, 2**32 - 1, 0), "bytes, but"),
        (lambda raw: raw[:20] + struct.pack("<I", 1) + raw[24:], "last word"),
    ],
)
def test_broken_dumps_are_refused(tmp_path: Path, change: object, text: str) -> None:
    path = write(tmp_path / "a.hfhs")
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(HiddenError, match=text):
        open_hidden(path)


def test_a_missing_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HiddenError, match="cannot be read"):
        open_hidden(tmp_path / "none")


def test_an_unfinished_dump_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 1 of 3"), HiddenWriter(tmp_path / "a", 3, 5, 8) as writer:
        writer.add(VALUES[0])
    with pytest.raises(KeyboardInterrupt), HiddenWriter(tmp_path / "a", 3, 5, 8) as writer:
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="does not fit"), HiddenWriter(tmp_path / "a", 3, 5, 8) as writer:
        writer.add(VALUES[0][:2])
    assert list(tmp_path.iterdir()) == []


def test_comparison_names_the_layer_that_differs(tmp_path: Path) -> None:
    other = VALUES.copy()
    other[1, 3] *= -1
    rows = list(compare_hidden(open_hidden(write(tmp_path / "a")), open_hidden(write(tmp_path / "b", other))))
    assert [row.cosine_min for row in rows] == pytest.approx([1, -1, 1])
    assert [row.max_difference == 0 for row in rows] == [True, False, True]
    assert rows[1].cosine_mean == pytest.approx(0.6)


def test_dumps_of_different_runs_cannot_be_compared(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", VALUES[:, :4])
    with pytest.raises(InputError, match="dump both with the same model"):
        list(compare_hidden(open_hidden(a), open_hidden(b)))
    empty = write(tmp_path / "c", VALUES[:, :0])
    with pytest.raises(InputError, match="holds no values"):
        list(compare_hidden(open_hidden(empty), open_hidden(empty)))


def test_a_dump_into_a_stream_that_is_full(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="/dev/full: the disk is full"),
        HiddenWriter(Path("/dev/full"), 1, 300, 256) as writer,
    ):
        writer.add(np.zeros((300, 256), np.float32))
    with HiddenWriter(Path("/dev/null"), 1, 3, 8) as writer:
        writer.add(np.zeros((3, 8), np.float32))
