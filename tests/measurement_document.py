"""A measurement of a model of two layers, as a document."""

from __future__ import annotations

from typing import Any

FORMATS = ("MQ2-Lloyd", "MQ3-Lloyd", "MQ4")


def document(**changes: Any) -> dict[str, Any]:
    """A whole measurement whose losses halve with each format."""
    rest = changes.get("rest", 0.001)
    pieces = [
        {
            "layer": layer,
            "projection": projection,
            "kld": {f: rest + (layer + 1) * scale / 2**i for i, f in enumerate(FORMATS)},
        }
        for layer in range(2)
        for projection, scale in (("gate_up", 0.04), ("down", 0.01))
    ]
    return {
        "kind": "mq-quant measurement",
        "version": 1,
        "model": {
            "name": "small",
            "layers": 2,
            "hidden": 256,
            "intermediate": 256,
            "experts": 4,
            "experts_per_token": 2,
            "vocabulary": 300,
            "origin": {"repository": "somebody/small"},
            "files": {"config.json": "1" * 64, "model.safetensors": "2" * 64},
        },
        "effort": "calibrated",
        "text": {"tokens": 512, "sha256": "3" * 64},
        "formats": list(FORMATS),
        "pieces": pieces,
        "rest": rest,
        "whole": {"MQ2-Lloyd": 0.17, "MQ2-Lloyd/MQ4": 0.14},
        **changes,
    }
