"""Which tensors belong to multi-token-prediction modules, and which to decoder layers that the config does not count.

Such a module has a name of its own (mtp, nextn), or it follows the last decoder layer as a further one. In that case it
is a decoder layer with tensors that join the last hidden state and the next token's embedding. A further layer without
these is a module if config.json counts it and something of a decoder layer is missing. Any other further layer means
that num_hidden_layers is too small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..minimax import ModelConfig, layer_inventory

_NAMED = re.compile(r"(model\.)?(mtp|nextn)\w*\.")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.*)")
_JOINING = re.compile(r"(eh_proj|enorm|hnorm|shared_head|embed_tokens|\w*(mtp|nextn)\w*)\..*")
"""Tensors of a further layer that no decoder layer has."""
_COUNT = re.compile(r"(num|n)_(mtp|nextn)\w*|(mtp|nextn)_num\w*")
_LAYERS_EACH = "mtp_transformer_layers"
UNCOUNTED_HINT = (
    "correct num_hidden_layers in config.json; multi-token-prediction modules need a key such as num_mtp_modules "
    "that counts them, or tensors such as eh_proj"
)


@dataclass(frozen=True)
class FurtherLayers:
    """The tensors behind the last decoder layer, and of modules with a name of their own."""

    mtp: tuple[str, ...]
    uncounted: tuple[str, ...]
    """Of layers that are no multi-token-prediction modules."""
    problem: str = ""
    """What is wrong with the first of `uncounted`."""


def further_layers(names: Iterable[str], config: ModelConfig, raw: Mapping[str, Any]) -> FurtherLayers:
    """Sort the names that lie outside the decoder; `raw` is config.json."""
    layers: dict[int, set[str]] = {}
    own = list[str]()
    for name in names:
        match = _LAYER.match(name)
        if match and int(match[1]) >= config.num_hidden_layers:
            layers.setdefault(int(match[1]), set()).add(match[2])
        elif _NAMED.match(name):
            own.append(name)
    last = config.num_hidden_layers + modules(raw)
    whole = _decoder_layer(config) if layers else frozenset()
    uncounted = [n for n in sorted(layers) if not _is_module(layers[n], n < last, whole)]
    mtp = [*own, *(f"model.layers.{n}.{part}" for n in layers if n not in uncounted for part in layers[n])]
    others = [f"model.layers.{n}.{part}" for n in uncounted for part in sorted(layers[n])]
    problem = _problem(uncounted[0], config, whole <= layers[uncounted[0]]) if uncounted else ""
    return FurtherLayers(tuple(sorted(mtp)), tuple(others), problem)


def modules(raw: Mapping[str, Any]) -> int:
    """Layers of multi-token prediction that a config.json counts, under whichever of their names; 0 without any."""
    each = raw.get(_LAYERS_EACH)
    counts = [value for key, value in raw.items() if _COUNT.fullmatch(key) and _is_count(value)]
    return max(counts, default=0) * (each if _is_count(each) and each else 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1000


def _decoder_layer(config: ModelConfig) -> frozenset[str]:
    """The names of a decoder layer's weights behind `model.layers.N.`."""
    return frozenset(spec.name.removeprefix("model.layers.0.") for spec in layer_inventory(config, 0))


def _is_module(parts: set[str], counted: bool, whole: frozenset[str]) -> bool:
    return any(_JOINING.fullmatch(part) for part in parts) or (counted and not whole <= parts)


def _problem(layer: int, config: ModelConfig, is_whole: bool) -> str:
    where = f"belongs to layer {layer}, but num_hidden_layers in config.json is {config.num_hidden_layers}"
    if is_whole:
        return f"{where}, and the layer is a whole decoder layer, not a multi-token-prediction module"
    return f"{where}, and no key such as num_mtp_modules counts it as a multi-token-prediction module"
