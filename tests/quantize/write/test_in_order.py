"""Work for the disk: one piece after the other, beside whoever gives it, whose errors come before anything else."""

from __future__ import annotations

import threading

import pytest
from mq_quant.quantize.write.in_order import InOrder


def test_pieces_are_done_in_their_order_on_a_thread_of_their_own() -> None:
    done: list[tuple[int, bool]] = []
    with InOrder() as disk:
        for n in range(20):
            disk.do(lambda n=n: done.append((n, threading.current_thread() is threading.main_thread())))  # type: ignore[misc]
    assert done == [(n, False) for n in range(20)]


def test_the_next_piece_waits_for_the_last_one_and_whoever_gives_it_does_not() -> None:
    free, given, seen = threading.Event(), threading.Event(), []
    with InOrder() as disk:
        disk.do(lambda: seen.append(free.wait(30)))
        assert not seen  # the first one is under way, and this thread goes on
        giver = threading.Thread(target=lambda: (disk.do(lambda: seen.append(False)), given.set()))
        giver.start()
        assert not given.is_set()
        free.set()
        giver.join()
    assert seen == [True, False]


def test_after_an_error_nothing_else_is_begun() -> None:
    disk, done = InOrder(), []
    with pytest.raises(OSError, match="full"), disk:
        disk.do(full)
        disk.do(lambda: done.append(1))
    assert not done


def test_the_error_of_the_last_piece_is_raised_at_the_end() -> None:
    with pytest.raises(OSError, match="full"), InOrder() as disk:
        disk.do(full)


def test_an_error_of_whoever_gives_comes_first_and_what_was_given_is_done() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="mine"), InOrder() as disk:
        disk.do(lambda: done.append(1))
        disk.do(full)
        raise ValueError("mine")
    assert done == [1]


def full() -> None:
    raise OSError("full")
