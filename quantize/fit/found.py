"""What a run of all streams found, as a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.checkpoint.source import Source
from ...formats.hfq.provenance import KEY, Provenance
from ..calibrate.tokens import Tokens, token_record
from ..spec.recipe import Effort
from .before import WHOLES
from .measurement import MeasuredModel, MeasuredText, Measurement, Piece, dimensions, whole_name
from .streams import REST, Streams


@dataclass(frozen=True)
class Found:
    """The KLD f64 [positions] of every stream by its name, the source's fingerprint, and what a file would say of its
    importances.
    """

    divergences: Mapping[str, NDArray[np.float64]]
    files: Mapping[str, Mapping[str, Any]]
    stated: Mapping[str, Any]
    resumed_layers: int
    seconds: float


def measurement_of(
    found: Found, plan: Streams, source: Source, name: str, judged: Tokens, effort: Effort | None
) -> Measurement:
    """The mean KLD of each piece and whole, measured of the model `name` on the tokens `judged`."""
    losses = {stream: float(kld.mean()) for stream, kld in found.divergences.items()}
    stated = Provenance.read({KEY: found.stated})
    pieces = []
    for layer in range(source.config.num_hidden_layers):
        kinds = plan.pieces(layer)
        gate_up = {c.gate_up: losses[stream] for stream, c in kinds.items() if c.gate_up is not None}
        down = {c.down: losses[stream] for stream, c in kinds.items() if c.down is not None}
        pieces.append(Piece(layer=layer, projection="gate_up", kld=gate_up))
        pieces.append(Piece(layer=layer, projection="down", kld=down))
    return Measurement(
        model=MeasuredModel(
            name=name,
            origin=dict(source.origin),
            files={name: file["sha256"] for name, file in found.files.items()},
            **dimensions(source.config),
        ),
        effort="imatrix" if effort == "imatrix" else "calibrated",
        text=MeasuredText(tokens=int(judged.size), sha256=token_record(judged)["sha256"]),
        calibration=_calibration(stated),
        imatrix=stated.imatrix.sha256 if stated.imatrix else None,
        formats=plan.formats,
        pieces=tuple(pieces),
        rest=losses[REST],
        whole={whole_name(*map(str, c)): losses[f"whole{i}"] for i, c in enumerate(WHOLES)},
    )


def _calibration(stated: Provenance) -> MeasuredText | None:
    """The tokens that importances were gathered from, if they were."""
    count = stated.calibration_tokens
    if stated.calibration is None or count is None:
        return None
    return MeasuredText(tokens=count, sha256=stated.calibration.document["tokens"]["sha256"])
