"""Recordings: what is recorded when, and what is forgotten when memory moves."""

from __future__ import annotations

import pytest
from mq_quant.kernels.encode.recordings import Recordings
from mq_quant.kernels.encode.space import Space


class Device:
    """Stands for a back end: it says what was recorded, and each recording says that it was done."""

    def __init__(self):
        self.done = []

    def record(self, work):
        work()
        self.done.append("record")
        return lambda: self.done.append("do")


@pytest.fixture
def device():
    return Device()


def moved(space):
    """The space gives up a buffer for a larger one."""
    space.moves += 1


@pytest.fixture
def run(device):
    space = Space(device)
    recordings = Recordings(device, space)

    def ask(key, moves=()):
        device.done.clear()
        left = list(moves)
        recordings.run(key, lambda: left and left.pop() and moved(space))
        return list(device.done)

    ask.space = space
    return ask


def test_the_first_is_recorded_and_all_are_done_from_the_recording(run):
    assert [run("a") for _ in range(3)] == [["record", "do"], ["do"], ["do"]]


def test_each_key_has_a_recording_of_its_own(run):
    run("a")
    assert run("b") == ["record", "do"] and run("a") == ["do"]


def test_after_memory_has_moved_nothing_recorded_is_used(run):
    run("a")
    moved(run.space)
    assert run("b") == ["record", "do"]
    assert run("a") == ["record", "do"]


def test_what_moves_memory_itself_is_recorded_again_before_it_is_done(run):
    run("a")
    assert run("b", moves=[True]) == ["record", "record", "do"]
    assert run("b") == ["do"]
    assert run("a") == ["record", "do"]


def test_a_recording_that_fails_is_made_again(device):
    recordings = Recordings(device, Space(device))
    real, device.record = device.record, lambda work: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        recordings.run("a", lambda: None)
    device.record = real
    recordings.run("a", lambda: None)
    assert device.done == ["record", "do"]
