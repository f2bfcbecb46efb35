"""Recordings: what is done when, and what is forgotten when memory moves."""

from __future__ import annotations

import pytest
from mq_quant.kernels.encode.recordings import Recordings
from mq_quant.kernels.encode.space import Space


class Device:
    """Stands for a back end: it says what was recorded, and each recording says that it was done again."""

    def __init__(self):
        self.done = []

    def record(self, work):
        self.done.append("record")
        return lambda: self.done.append("again")


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

    def ask(key, part=False, moves=False):
        device.done.clear()

        def work(what):
            device.done.append(what)
            if moves:
                moved(space)

        recordings.run(key, lambda: work("whole"), (lambda: work("part")) if part else None)
        return list(device.done)

    ask.space = space
    return ask


def test_the_first_is_done_the_second_recorded_the_third_done_again(run):
    assert [run("a") for _ in range(3)] == [["whole"], ["record", "again"], ["again"]]


def test_a_part_that_takes_all_memory_lets_the_whole_be_recorded_at_once(run):
    assert [run("a", part=True) for _ in range(2)] == [["part", "record", "again"], ["again"]]


def test_each_key_has_a_recording_of_its_own(run):
    run("a", part=True)
    assert run("b") == ["whole"] and run("a") == ["again"]


@pytest.mark.parametrize("part", [False, True])
def test_after_memory_has_moved_nothing_recorded_is_used(run, part):
    run("a", part=True)
    moved(run.space)
    first = run("a", part=part)
    assert first == (["part", "record", "again"] if part else ["whole"])


def test_what_moves_memory_itself_forgets_others_and_is_recorded_next(run):
    run("a", part=True)
    run("b", moves=True)
    assert run("b") == ["record", "again"]
    assert run("a", part=True) == ["part", "record", "again"]


def test_a_part_that_moves_memory_does_so_before_the_whole_is_recorded(run):
    assert run("a", part=True, moves=True) == ["part", "record", "again"]
    assert run("a", part=True) == ["again"]


def test_a_recording_that_fails_is_made_again(device):
    recordings = Recordings(device, Space(device))
    real, device.record = device.record, lambda work: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        recordings.run("a", lambda: None, lambda: None)
    device.record = real
    recordings.run("a", lambda: None, lambda: None)
    assert device.done == ["record", "again"]
