"""Memory that experts use one after another: nobody shares it meanwhile, and it is used again."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from mq_quant.quantize.encode.rooms import Rooms


def test_nobody_else_has_what_is_taken() -> None:
    rooms = Rooms(9)
    with rooms.taken() as one, rooms.taken() as other:
        assert one.shape == (9,) and not np.shares_memory(one, other)
    with rooms.taken() as again:
        assert np.shares_memory(again, one) or np.shares_memory(again, other)


def test_what_is_taken_comes_back_after_an_error() -> None:
    rooms, seen = Rooms(9), []
    with pytest.raises(ValueError, match="bad"), rooms.taken() as room:
        seen.append(room)
        raise ValueError("bad")
    with rooms.taken() as room:
        assert room is seen[0]


def test_threads_take_as_many_as_there_are() -> None:
    rooms, seen, both = Rooms(9), [], threading.Barrier(2)

    def work() -> None:
        for _ in range(3):
            with rooms.taken() as room:
                seen.append(room)
                both.wait(timeout=60)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 6
    assert len({room.ctypes.data for room in seen}) == 2
