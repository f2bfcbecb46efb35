"""Changes that break a file: of its bytes, and of values inside JSON, all drawn from one seeded generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

TOKENS = [
    *(b'{ } [ ] " \\ , : \\" {} [] "a":1, null -1 1e999 NaN \\ud800 - ? & * ! | > %'.split(b" ")),
    b"[" * 5000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"\xff\xfe",
    b"\x1b[2J",
    b"../x.safetensors",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"\0",
]
NUMBERS = [
    n.to_bytes(width, "little")
    for width in (1, 2, 4, 8)
    for n in (0, 1, 1 << 8 * width - 1, (1 << 8 * width) - 1, (1 << 8 * width - 1) - 1, 1 << 4 * width)
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        10**300,
        1e308,
        1e-320,
        0.5,
        "",
        "x",
        "\x1b[2J",
        "\u202e",
        "\ud7ff",
    ),
    *([], {}, [[]], [1, "a", None], {"a": {"b": []}}, "a" * 10000, "../../etc/passwd", "0" * 64, [0] * 1000),
]


def mutate_bytes(rng: random.Random, seed: bytes) -> bytes:
    """The bytes with one to four changes; heads of files, where the structure is, are hit more often."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        _change(rng, data)
    return bytes(data)


def _change(rng: random.Random, data: bytearray) -> None:
    at = min(int(rng.random() ** rng.choice([1, 3, 6]) * len(data)), max(len(data) - 1, 0))
    span = rng.randint(1, 64)
    kind = rng.choice(("bit", "number", "token", "cut", "delete", "repeat", "turn", "zero"))
    if kind == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "number":
        value = rng.choice(NUMBERS)
        data[at : at + len(value)] = value
    elif kind == "token":
        data[at : at + span % 9] = rng.choice(TOKENS)
    elif kind == "cut":
        del data[at:]
    elif kind == "delete":
        del data[at : at + span]
    elif kind == "repeat":
        data[at:at] = data[at : at + span]
    elif kind == "turn":
        data[at : at + span] = data[at : at + span][::-1]
    elif kind == "zero":
        data[at : at + span * 64] = bytes(len(data[at : at + span * 64]))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def mutate_json(rng: random.Random, seed: bytes) -> bytes:
    """A JSON object in which one to three values are others, lie elsewhere, are gone, or stand under a new key."""
    document = json.loads(seed)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(document))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.choice(("replace", "replace", "swap", "remove", "add"))
        if kind == "replace":
            holder[key] = deepcopy(rng.choice(VALUES))
        elif kind == "swap":
            other, name = rng.choice(places)
            holder[key] = deepcopy(other[name])
        elif kind == "remove" and isinstance(holder, dict):
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[f"{key}{rng.choice(['', '_scale', 'x', chr(27)])}"] = deepcopy(rng.choice(VALUES))
    return json.dumps(document).encode()


def either(*ways: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, bytes], bytes]:
    """One of several ways to change bytes, drawn anew each time."""
    return lambda rng, seed: rng.choice(ways)(rng, seed)
