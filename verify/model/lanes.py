"""Streams of GPUs in which experts of a layer run beside each other: the products of one leave a part of a GPU idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

LANES = 2
"""Experts that run beside each other on a GPU; three are no faster."""


class Lanes:
    """So many streams of each GPU among devices; anything else has none, and work there is done in its order."""

    def __init__(self, devices: Sequence[torch.device], count: int = LANES) -> None:
        gpus = {device for device in devices if device.type == "cuda"}
        self._of = {
            device: [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]
            for device in gpus
        }

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A block for work in lanes. It begins behind what this thread has asked of the devices, and what the thread
        asks of them afterwards begins behind it.
        """
        for device, streams in self._of.items():
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream(device))
        try:
            yield
        finally:
            for device, streams in self._of.items():
                for stream in streams:
                    torch.cuda.current_stream(device).wait_stream(stream)

    def lane(self, device: torch.device, number: int) -> AbstractContextManager[object]:
        """A block whose work on a device is done in one of its lanes, in turns by this number."""
        streams = self._of.get(device)
        return torch.cuda.stream(streams[number % len(streams)]) if streams else nullcontext()


NO_LANES = Lanes(())
