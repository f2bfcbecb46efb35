"""Losses for models that nobody has measured: what two small trained MiniMax-M2 have in common (docs/fit.md).

Both lose more with each layer at gate and up, a little less at down, and a format loses nearly the same share of what
the smallest one loses at every piece. The numbers are relative: they say where bytes count most, and no KLD.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...formats.minimax import ModelConfig
from .losses import Losses
from .measurement import PROJECTIONS, Projection

ORIGIN = "losses typical of two small models"
SHARES: Mapping[str, float] = {"MQ2-Lloyd": 1.0, "MQ3-Lloyd": 0.28, "MQ4": 0.1, "MQ6": 0.01}
"""What a format loses, as a share of what MQ2-Lloyd loses at the same piece."""
DEPTH: Mapping[Projection, tuple[float, float]] = {"gate_up": (0.27, 0.77), "down": (0.52, 0.38)}
"""What a layer's projection loses at the first and at the last layer, linear between them."""

DOUBT = 0.02
"""Differences up to this share were wrong on one of the two models."""


def generic(config: ModelConfig) -> Losses:
    """Losses for a model of these dimensions."""
    layers = config.num_hidden_layers
    pieces = []
    for layer in range(layers):
        depth = (layer + 0.5) / layers
        for projection in PROJECTIONS:
            first, last = DEPTH[projection]
            weight = first + (last - first) * depth
            pieces.append({name: weight * share for name, share in SHARES.items()})
    return Losses(tuple(pieces), ORIGIN, doubt=DOUBT)
