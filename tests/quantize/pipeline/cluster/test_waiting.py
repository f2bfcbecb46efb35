"""A driver that waits says for what, and not for ever where no node can take its tasks."""

from __future__ import annotations

import pytest
from mq_quant.formats.errors import ClusterError
from mq_quant.quantize.pipeline.cluster.ray_session import Needs
from mq_quant.quantize.pipeline.cluster.waiting import LOST, QUIET, Waiting

SMALL, LARGE = {"CPU": 4.0, "memory": 8e9}, {"CPU": 16.0, "GPU": 2.0, "memory": 64e9}


class Driver:
    """A driver that looks around by a clock of its own, and what it has said."""

    def __init__(self) -> None:
        self.said = list[str]()
        self.waiting = Waiting(Needs(8, 1, 10**9), 100.0, self.said.append)

    def look(self, nodes: list[dict[str, float]], *times: float) -> None:
        for time in times:
            self.waiting.look(nodes, 100.0 + time)


def test_busy_nodes_are_waited_for_with_a_word_now_and_then() -> None:
    driver = Driver()
    driver.look([LARGE, SMALL, LARGE], 0, QUIET - 1)
    assert not driver.said
    driver.look([LARGE, SMALL, LARGE], *range(int(QUIET), int(4 * QUIET)))
    assert driver.said == [
        f"no task has ended for {minutes} minutes; each asks for 8 cores, 1 GPU and 1.0 GB of memory, and there are "
        "2 nodes with 16 cores, 2 GPUs and 64.0 GB of memory; 1 node with 4 cores, 0 GPUs and 8.0 GB of memory. "
        "`ray status` tells whether others use them"
        for minutes in (5, 10)
    ]


def test_every_task_that_ends_is_a_sign_of_life() -> None:
    driver = Driver()
    for n in range(1, 50):
        driver.look([LARGE], n * (QUIET - 1))
        driver.waiting.heard(100.0 + n * (QUIET - 1))
    assert not driver.said
    driver.look([LARGE], 60 * QUIET)
    assert len(driver.said) == 1


def test_long_tasks_are_no_reason_to_complain_again_and_again() -> None:
    driver = Driver()
    for n in range(1, 10):
        driver.look([LARGE], *(QUIET * (3 * (n - 1) + m / 10) for m in range(1, 31)))
        driver.waiting.heard(100.0 + 3 * QUIET * n)
    assert len(driver.said) == 2  # before the first one has ended: after one, and after two times as long


def test_without_a_node_for_its_tasks_a_driver_gives_up_after_a_while() -> None:
    driver = Driver()
    driver.look([SMALL], 0, 1, LOST - 1)
    asks = (
        "no node of the cluster can take a task: each asks for 8 cores, 1 GPU and 1.0 GB of memory, and there"
    )
    small = "1 node with 4 cores, 0 GPUs and 8.0 GB of memory"
    assert driver.said == [f"{asks} is {small}. The build waits 10 minutes for one that can"]
    with pytest.raises(ClusterError) as given_up:
        driver.look([SMALL, SMALL], LOST)
    assert given_up.value.problem == f"{asks} are 2 nodes{small[6:]}, for 10 minutes by now"
    assert "the same command continues" in str(given_up.value.hint)
    with pytest.raises(ClusterError, match="there are no nodes, for 11 minutes"):
        driver.look([], LOST + 60)


def test_a_node_that_comes_back_ends_the_count() -> None:
    driver = Driver()
    driver.look([], 0, LOST - 1)
    driver.look([LARGE], LOST)
    driver.look([], LOST + 1, 2 * LOST)
    assert len(driver.said) == 2
