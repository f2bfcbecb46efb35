"""Layers of the source that lie on devices, each run on a thread of its own: the one whose experts are encoded and,
where there is room, those behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ...verify.model.device_weights import DeviceWeights
from ..encode.on_device.kept import KeptOnDevice

T = TypeVar("T")


@dataclass(frozen=True)
class Resident:
    """A layer whose inputs and weights lie on the device, and the stream f32 [sequences, length, hidden] behind it,
    where the layer was run to its end.
    """

    weights: DeviceWeights
    importance: KeptOnDevice
    behind: Tensor | None


Run = Callable[[int, Tensor | None], tuple[Resident, Callable[[], None]]]
"""Runs a layer on the stream f32 that enters it, None where that is to be found; returns the layer and what makes it
durable.
"""


@dataclass(frozen=True)
class _Coming:
    """A layer that is here once it is `made`, and durable once it is `written`."""

    made: Future[Resident]
    written: Future[None]


class Residents:
    """Called on one thread, but for `importance`."""

    def __init__(self, run: Run, beside: Callable[[], AbstractContextManager[object]], room: int) -> None:
        """`beside()` makes the work of a thread wait for none of others; there is room for so many layers."""
        self._run, self._beside, self._room = run, beside, room
        self._coming: dict[int, _Coming] = {}
        self._behind: tuple[int, Tensor | None] = 0, None

    def __contains__(self, layer: int) -> bool:
        return layer in self._coming

    def enters(self, layer: int, stream: Tensor) -> None:
        """Keep the stream that enters a layer until that is run."""
        self._behind = layer, stream

    def take(self, layer: int) -> Tensor | None:
        """The stream that enters a layer, where it was kept; it is not kept any longer."""
        (n, stream), self._behind = self._behind, (0, None)
        return stream if n == layer else None

    def start(self, layer: int) -> None:
        """Begin to run a layer, after the one before if that is here."""
        before, made, kept = self._coming.get(layer - 1), Future[Resident](), self.take(layer)

        def work() -> None:
            with self._beside():
                try:
                    resident, finish = self._run(layer, before.made.result().behind if before else kept)
                except BaseException as e:
                    made.set_exception(e)
                    raise
                made.set_result(resident)
                if before is not None:
                    before.written.result()
                finish()

        self._coming[layer] = _Coming(made, on_a_thread(work))

    def fill(self, last: int) -> None:
        """Begin to run the layers behind those that are here, as many as there is room for, and none behind `last`."""
        while len(self._coming) < self._room and (coming := max(self._coming) + 1) <= last:
            self.start(coming)

    def importance(self, layer: int) -> KeptOnDevice:
        """The importances of a layer that was started, once it is here; raises what stood in its way."""
        return self._coming[layer].made.result().importance

    def holds_before(self, layer: int) -> bool:
        """Whether an earlier layer is here."""
        return min(self._coming, default=layer) < layer

    def leave(self, layer: int) -> None:
        """Let go of earlier layers; the stream behind the last of them stays for the next one.

        Raises what stood in the way of making one of them durable.
        """
        for n in sorted(n for n in self._coming if n < layer):
            coming = self._coming.pop(n)
            wait([coming.written])
            if n + 1 not in self._coming:
                self._behind = n + 1, coming.made.result().behind
            coming.made.result().weights.close()
            coming.written.result()

    def settle(self) -> None:
        """Wait until all that was started is durable; raises what stood in its way."""
        for coming in self._coming.values():
            coming.written.result()

    def close(self) -> None:
        """Let go of all layers, whatever became of them."""
        for coming in self._coming.values():
            wait([coming.written])
            if coming.made.exception() is None:
                coming.made.result().weights.close()
        self._coming.clear()
        self._behind = 0, None


def on_a_thread(work: Callable[[], T]) -> Future[T]:
    """Some work on a thread of its own."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="layer")
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)
