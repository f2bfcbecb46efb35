"""Lanes of a GPU: nothing in them begins before what was asked for earlier, and nothing later before they are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from mq_quant.verify.model.lanes import Lanes

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@dataclass(eq=False)
class Stream:
    """A stream that notes what it does and waits for."""

    device: torch.device
    seen: list[object] = field(default_factory=list)

    def wait_stream(self, other: Stream) -> None:
        self.seen.append((other, len(other.seen)))


@dataclass
class Gpus:
    """Two GPUs with the streams that this thread works in."""

    made: list[Stream] = field(default_factory=list)
    current: dict[torch.device, Stream] = field(
        default_factory=lambda: {d: Stream(d) for d in (FIRST, SECOND)}
    )

    def make(self, device: torch.device) -> Stream:
        self.made.append(Stream(device))
        return self.made[-1]

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        yield
        self.current[stream.device] = before

    def work(self, device: torch.device, name: str) -> None:
        self.current[device].seen.append(name)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """In place of torch's."""
    gpus = Gpus()
    monkeypatch.setattr(torch.cuda, "Stream", gpus.make)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpus.current[device])
    monkeypatch.setattr(torch.cuda, "stream", gpus.within)
    return gpus


def test_work_in_lanes_lies_between_what_comes_before_and_after(gpus: Gpus) -> None:
    lanes = Lanes((FIRST, SECOND), 2)
    mine = {**gpus.current}
    for device in (FIRST, SECOND):
        gpus.work(device, "before")
    with lanes.opened():
        for n in range(3):
            for device in (FIRST, SECOND):
                with lanes.lane(device, n):
                    gpus.work(device, f"expert {n}")
    assert gpus.current == mine
    for device, this in mine.items():
        even, odd = (stream for stream in gpus.made if stream.device == device)
        assert even.seen == [(this, 1), "expert 0", "expert 2"] and odd.seen == [(this, 1), "expert 1"]
        assert this.seen == ["before", (even, 3), (odd, 2)]


def test_an_error_leaves_no_lane_unwaited_for(gpus: Gpus) -> None:
    lanes = Lanes((FIRST,), 3)
    with pytest.raises(ValueError, match="mine"), lanes.opened():
        raise ValueError("mine")
    assert [stream for stream, _ in gpus.current[FIRST].seen] == gpus.made  # type: ignore[misc]


def test_a_cpu_has_none(gpus: Gpus) -> None:
    lanes = Lanes((CPU, CPU))
    with lanes.opened(), lanes.lane(CPU, 5):
        pass
    assert not gpus.made
