"""Payloads reach the driver's file from those who see it and from those who do not, and from nobody else."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Client
from pathlib import Path

import pytest
from mq_quant.formats.errors import ClusterError, OutputError
from mq_quant.quantize.pipeline.cluster.delivery import SharedFile, ToDriver, marker_of, open_sink, receiving

HOST = "127.0.0.1"


@pytest.fixture
def written() -> dict[int, bytes]:
    return {}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "out.partial"
    path.write_bytes(bytes(20))
    return path


def test_who_sees_the_file_writes_into_it(path: Path, written: dict[int, bytes]) -> None:
    with receiving(path, HOST, written.__setitem__) as target, open_sink(target) as sink:
        assert isinstance(sink, SharedFile)
        sink.put(8, memoryview(b"payload"))
        sink.sync()
    assert path.read_bytes() == bytes(8) + b"payload" + bytes(5)
    assert not written
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_who_does_not_see_the_file_sends_payloads(path: Path, written: dict[int, bytes]) -> None:
    with receiving(path, HOST, written.__setitem__, shared=False) as target, open_sink(target) as sink:
        assert isinstance(sink, ToDriver)
        for offset in (0, 1 << 40):
            sink.put(offset, memoryview(b"x" * 100_000))
        sink.sync()
    assert written == {0: b"x" * 100_000, 1 << 40: b"x" * 100_000}
    assert path.read_bytes() == bytes(20)


def test_a_file_of_the_same_name_on_another_disk_is_not_written(
    path: Path, tmp_path: Path, written: dict[int, bytes]
) -> None:
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_bytes(b"precious")
    marker_of(other).write_bytes(bytes(32))
    with (
        receiving(path, HOST, written.__setitem__) as target,
        open_sink(replace(target, path=str(other))) as sink,
    ):
        sink.put(0, memoryview(b"payload"))
    assert other.read_bytes() == b"precious"
    assert written == {0: b"payload"}


def test_nobody_delivers_without_the_secret(path: Path, written: dict[int, bytes]) -> None:
    with receiving(path, HOST, written.__setitem__, shared=False) as target:
        with pytest.raises(ClusterError, match="sees neither the output's folder nor the driver"):
            ToDriver(replace(target, secret=bytes(32)))
        with Client(target.address) as stranger:
            stranger.send_bytes(b"hello")
        with Client(target.address), open_sink(target) as sink:  # a silent one keeps nobody waiting
            sink.put(3, memoryview(b"payload"))
    assert written == {3: b"payload"}


def test_a_driver_that_has_gone_or_cannot_write_is_named(path: Path) -> None:
    def full(offset: int, payload: bytes) -> None:
        raise OutputError("the disk is full", file=path)

    refused = pytest.raises(ClusterError, match=r"nor the driver at 127\.0\.0\.1")
    with receiving(path, HOST, full, shared=False) as target, open_sink(target) as sink, refused:
        sink.put(0, memoryview(b"payload"))
    with refused, open_sink(target):
        pass


def test_a_link_in_place_of_the_marker_is_refused(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    marker_of(path).symlink_to(victim)
    with pytest.raises(OutputError, match="symbolic link"), receiving(path, HOST, lambda *_: None):
        pass
    assert victim.read_bytes() == b"precious"
