"""What has to be done between layers where a build gathers its own calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...formats.watch import UNWATCHED, Watch
from ..spec.hooks import nothing

if TYPE_CHECKING:
    from ..calibrate.on_the_fly import GatheredImportance


class Turns(Protocol):
    """What has to be done between layers, on the calling thread."""

    def begin(self, layer: int) -> None:
        """Everything before a layer is delivered, and nothing of it is begun."""
        ...

    def under_way(self, layer: int) -> bool:
        """Whether a layer may be begun without that."""
        ...

    def end_before(self, layer: int) -> None:
        """Everything before a layer is delivered, some of which may have been under way when the layer was begun."""
        ...


@dataclass(frozen=True)
class LayersInTurn:
    """A calibration that is gathered layer by layer, while they are encoded. What was encoded with the moments of a
    layer is synced before these go. Only where they may `overlap` is a layer begun while the one before is under way:
    tuning has the device for itself.
    """

    gathered: GatheredImportance
    overlap: bool = True
    sync: Callable[[], None] = nothing
    watch: Watch = UNWATCHED

    def begin(self, layer: int) -> None:
        """As `Turns.begin`."""
        self.sync()
        self.watch.advance(0, f"running layer {layer} of the source")
        self.gathered.begin_layer(layer)

    def under_way(self, layer: int) -> bool:
        """As `Turns.under_way`."""
        return self.overlap and self.gathered.under_way(layer)

    def end_before(self, layer: int) -> None:
        """As `Turns.end_before`."""
        if self.overlap and self.gathered.holds_before(layer):
            self.sync()
            self.gathered.end_before(layer)
