"""A body that hardly comes is told of while it is waited for, and given up in the end; a watch ends with its body."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from mq_quant.formats.hub import body
from mq_quant.formats.hub.answers import Asked
from mq_quant.formats.hub.patience import AgainError, Patience

ASKED = Asked("acme/model/shard", "https://hub.example", True, False)


class Told(list[str]):
    """Lines that were told; `first` is set with the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = threading.Event()

    def __call__(self, text: str) -> None:
        self.append(text)
        self.first.set()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(body, "TELL_SECONDS", 0.01)
    return Told()


def watched(told: Told, chunks: Callable[[], Iterator[bytes]]) -> Any:
    response = SimpleNamespace(iter_raw=chunks)
    return body.watched(response, ASKED, {}, False, Patience(0.001, threading.Event(), told))


def watchers() -> int:
    return sum(thread.name == "hub" and thread.is_alive() for thread in threading.enumerate())


def test_a_body_that_stands_still_is_told_of_before_any_limit(told: Told) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"abc"
        assert told.first.wait(20)
        yield b"def"

    assert b"".join(watched(told, chunks)) == b"abcdef"
    assert "acme/model/shard: only" in told[0] and "https://hub.example" in told[0]


def test_a_body_that_never_begins_is_told_of(told: Told) -> None:
    def chunks() -> Iterator[bytes]:
        assert told.first.wait(20)
        yield from ()

    assert list(watched(told, chunks)) == []
    assert "only 0 bytes" in told[0]


@pytest.mark.parametrize(
    ("flow", "lines"),
    [(body._Flow(0, True), 1), (body._Flow(0, False), 0), (body._Flow(body.SLOW_BYTES, True), 0)],
)
def test_a_reader_that_takes_its_time_is_not_the_servers_fault(
    flow: body._Flow, lines: int, told: Told
) -> None:
    """The watcher looks once: it speaks where the reader waits and hardly a byte came."""
    looks = iter([False, True])
    ended: Any = SimpleNamespace(wait=lambda _: next(looks))
    body._watch(flow, ended, ASKED, Patience(0.001, threading.Event(), told))
    assert len(told) == lines


def test_a_body_that_drips_is_given_up(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "SLOW_SECONDS", 0.0)
    stream = watched(told, lambda: iter([b"a", b"b", b"c"]))
    with pytest.raises(AgainError, match="only 1 bytes came in"):
        list(stream)


def test_the_watch_of_a_body_that_is_left_ends(told: Told) -> None:
    before = watchers()
    stream = watched(told, lambda: iter([b"abc", b"def"]))
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name == "hub":
            thread.join(20)
    assert watchers() <= before


def test_the_body_of_a_redirect_is_read_if_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[int]()

    def chunks() -> Iterator[bytes]:
        for i in range(5):
            taken.append(i)
            yield b"x"

    response = SimpleNamespace(iter_raw=chunks)
    body.drain(response, {"content-length": str(body.SHORT_BODY + 1)})
    body.drain(response, {})
    assert taken == []
    body.drain(response, {"content-length": "5"})
    assert taken == [0, 1, 2, 3, 4]
    monkeypatch.setattr(body, "DRAIN_SECONDS", -1.0)
    body.drain(response, {"content-length": "5"})
    assert taken == [0, 1, 2, 3, 4, 0]
