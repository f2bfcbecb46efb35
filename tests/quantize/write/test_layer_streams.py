"""Streams that pass layers together: continued behind the last layer that all have passed, gone when all is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.errors import InUseError, ResumeError
from mq_quant.quantize.write.journal import EVALUATION
from mq_quant.quantize.write.layer_streams import JOURNAL, LayerStreams, layer_streams

SHAPE = (2, 3, 4)
STREAMS = {name: np.full(SHAPE, i, np.float32) for i, name in enumerate(("source", "file0"))}


@contextmanager
def opened(folder: Path, given: str = "a", restart: bool = False) -> Iterator[LayerStreams]:
    with layer_streams(
        folder / "work", SHAPE, EVALUATION, {"given": given}, restart, "begin anew"
    ) as streams:
        yield streams


def pass_layer(streams: LayerStreams, layer: int) -> None:
    hashes = {n: streams.folder.save(n, layer + 1, s + np.float32(layer)) for n, s in STREAMS.items()}
    streams.end_layer(layer, hashes, figures=[layer])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "work").iterdir())


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder in which a run was interrupted behind two layers."""
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as streams:
        assert streams.done == 0 and streams.hashes(0) == {}
        for layer in (0, 1):
            pass_layer(streams, layer)
        raise KeyboardInterrupt
    return tmp_path


def test_a_run_continues_with_the_streams_behind_the_last_layer(begun: Path) -> None:
    assert names(begun) == ["file0-00002.f32", JOURNAL, "source-00002.f32"]
    with opened(begun) as streams:
        assert streams.done == 2 and [streams.record(n)["figures"] for n in range(2)] == [[0], [1]]
        for name, stream in STREAMS.items():
            for read in (streams.load, streams.mapped):
                np.testing.assert_array_equal(read(name, 2), stream + 1)
        pass_layer(streams, 2)
        streams.finish()
    assert not (begun / "work").exists()


def test_a_run_that_ends_before_a_layer_is_passed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as streams:
        streams.folder.save("source", 1, STREAMS["source"])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_stream_is_refused(begun: Path) -> None:
    (begun / "work" / "file0-00002.f32").write_bytes(b"other")
    with opened(begun) as streams:
        for read in (streams.load, streams.mapped):
            with pytest.raises(
                ResumeError, match=r"file0-00002\.f32: is not as the earlier run left it"
            ) as e:
                read("file0", 2)
            assert e.value.hint == "begin anew"
    assert names(begun) == ["file0-00002.f32", JOURNAL, "source-00002.f32"]


def test_another_run_continues_it_only_if_it_may_restart(begun: Path) -> None:
    with pytest.raises(ResumeError, match="given"), opened(begun, "b"):
        raise AssertionError
    assert len(names(begun)) == 3
    with opened(begun, "b", restart=True) as streams:
        assert streams.done == 0 and names(begun) == [JOURNAL]


def test_nobody_else_has_it_meanwhile(begun: Path) -> None:
    with opened(begun) as streams:
        with pytest.raises(InUseError, match="another evaluation"), opened(begun, restart=True):
            raise AssertionError
        np.testing.assert_array_equal(streams.load("source", 2), STREAMS["source"] + 1)
