"""The formats of experts layer by layer, for a person: which layers have which, in a line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence


def formats_by_layer(formats: Mapping[int, str]) -> str:
    """`MQ3-Lloyd` where all layers have it, else `MQ2-Lloyd in layers 0-40, MQ3-Lloyd in layers 41-61`, that of most
    layers first; `formats` holds the name of each layer's format.
    """
    layers: defaultdict[str, list[int]] = defaultdict(list)
    for layer, name in sorted(formats.items()):
        layers[name].append(layer)
    if len(layers) <= 1:
        return next(iter(layers), "none")
    usual_first = sorted(layers.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{name} in {_named(held)}" for name, held in usual_first)


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {' '.join(_runs(layers))}"


def _runs(layers: Sequence[int]) -> Iterator[str]:
    """0-40 for each run of layers without a gap."""
    first = layers[0]
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if following != layer + 1:
            yield str(layer) if layer == first else f"{first}-{layer}"
            first = following if following is not None else layer
