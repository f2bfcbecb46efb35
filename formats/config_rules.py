"""What may stand in config.json without asking for another arithmetic: predicates over one value, and `Rule`.

A predicate gets the value and the whole config, and says whether the value is neutral. `null` always is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
Accepts = Callable[[Any, Config], bool]


def any_value(value: Any, config: Config) -> bool:
    """The key changes nothing that a file holds or that the engine computes."""
    return True


def off(value: Any, config: Config) -> bool:
    """A value that asks for nothing: null, false, 0, or empty."""
    return value is None or value in (False, "", [], {})


def one(value: Any, config: Config) -> bool:
    """A count or a period of one, or a list of ones."""
    return off(value, config) or factor(value, config)


def factor(value: Any, config: Config) -> bool:
    """A factor of one, or a list of such factors; a factor of zero would not be neutral."""
    return value is None or all(v == 1 for v in (value if isinstance(value, list) else [value]))


def true(value: Any, config: Config) -> bool:
    """Null or true."""
    return value is None or value is True


def among(*values: Any) -> Accepts:
    """Null or one of `values`, in any case of letters; a list must hold nothing else."""

    def accepts(value: Any, config: Config) -> bool:
        parts = value if isinstance(value, list) else [value]
        return value is None or all((p.lower() if isinstance(p, str) else p) in values for p in parts)

    return accepts


def same_as(key: str) -> Accepts:
    """Null or the value of another key, which is the one that is read; a list must hold nothing else."""

    def accepts(value: Any, config: Config) -> bool:
        parts = value if isinstance(value, list) else [value]
        return value is None or all(part == config.get(key) for part in parts)

    return accepts


def inverse_root(value: Any, config: Config) -> bool:
    """Null or 1 / sqrt(head_dim), the factor that attention scores have anyway."""
    size = config.get("head_dim")
    if type(value) not in (int, float) or type(size) is not int or size <= 0:
        return value is None
    return bool(abs(value - size**-0.5) < 1e-6)


def no_window(value: Any, config: Config) -> bool:
    """No window, or one that another key turns off."""
    return off(value, config) or config.get("use_sliding_window") is False


def no_shared_expert(value: Any, config: Config) -> bool:
    """How a shared expert is joined, where the config has none of any size."""
    return off(value, config) or off(config.get("shared_intermediate_size"), config)


def last_layer(value: Any, config: Config) -> bool:
    """Null, -1, or the number of the last layer."""
    layers = config.get("num_hidden_layers")
    return value in (None, -1) or (isinstance(layers, int) and value == layers - 1)


@dataclass(frozen=True)
class Rule:
    """Keys of one kind, the values that are right for them, and what the engine does.

    `keys` are regular expressions with spaces between them, each for the whole of a name.
    """

    keys: str
    accepts: Accepts
    engine: str = ""
