"""Work for the disk: some pieces beside whoever gives them, ended in their order, whose errors come before all else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from mq_quant.quantize.write.in_order import AT_ONCE, InOrder

LONG = 30


def nothing() -> None:
    pass


def full(_: object = None) -> None:
    raise OSError("full")


def test_pieces_end_in_their_order_on_threads_of_their_own() -> None:
    done: list[tuple[int, bool]] = []

    def end(n: int) -> None:
        done.append((n, threading.current_thread() is threading.main_thread()))

    with InOrder() as disk:
        for n in range(20):
            disk.do(lambda n=n: n, end)  # type: ignore[misc]
    assert done == [(n, False) for n in range(20)]


def test_pieces_are_under_way_together_and_the_earlier_one_ends_first() -> None:
    second, ended = threading.Event(), []
    with InOrder() as disk:
        disk.do(lambda: second.wait(LONG), ended.append)
        disk.do(lambda: second.set() or 2, ended.append)
    assert ended == [True, 2]


def test_no_more_are_under_way_than_may_be() -> None:
    free, given, seen = threading.Event(), threading.Event(), []
    with InOrder() as disk:
        for _ in range(AT_ONCE):
            disk.do(lambda: free.wait(LONG), seen.append)
        assert not seen  # they are under way, and this thread goes on
        giver = threading.Thread(target=lambda: (disk.do(nothing, seen.append), given.set()))
        giver.start()
        assert not given.is_set()
        free.set()
        giver.join()
    assert seen == [*[True] * AT_ONCE, None]


@pytest.mark.parametrize("piece", [(full, nothing), (nothing, full)])
def test_after_an_error_no_later_piece_is_ended(
    piece: tuple[Callable[..., None], Callable[..., None]],
) -> None:
    disk, begun, done = InOrder(), threading.Event(), []
    with pytest.raises(OSError, match="full"), disk:
        disk.do(lambda: begun.wait(LONG), lambda _: piece[0]())
        disk.do(piece[0], piece[1])
        begun.set()
        disk.do(nothing, done.append)
        disk.do(nothing, done.append)
    assert not done


@pytest.mark.parametrize("piece", [(full, nothing), (nothing, full)])
def test_the_error_of_the_last_piece_is_raised_at_the_end(piece: tuple[Callable[..., None], ...]) -> None:
    with pytest.raises(OSError, match="full"), InOrder() as disk:
        disk.do(*piece)


def test_the_first_error_is_the_one_that_is_raised() -> None:
    second = threading.Event()

    def slow() -> None:
        second.wait(LONG)
        raise ValueError("first")

    def fast() -> None:
        second.set()
        full()

    with pytest.raises(ValueError, match="first"), InOrder() as disk:
        disk.do(slow, full)
        disk.do(fast, full)


def test_an_error_of_whoever_gives_comes_first_and_what_was_given_is_done() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="mine"), InOrder() as disk:
        disk.do(lambda: 1, done.append)
        disk.do(full, done.append)
        raise ValueError("mine")
    assert done == [1]
