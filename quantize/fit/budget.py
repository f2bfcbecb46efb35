"""Budgets: how many bytes a file may have, said as its size, as the memory that runs it, or as bits per weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from ...formats.engine_rules import CONTEXT
from ...formats.errors import BudgetError
from ...formats.minimax import ModelConfig, inventory
from ..spec.running import HEADROOM, cache_bytes

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_UNITS: Mapping[str, int] = {
    "b": 1,
    **{unit: 1000**i for i, unit in enumerate(("kb", "mb", "gb", "tb"), 1)},
    **{unit: 1024**i for i, unit in enumerate(("kib", "mib", "gib", "tib"), 1)},
}
DIGITS = 40
"""Characters of the longest number that is read."""

Kind = Literal["memory", "size", "bits"]


@dataclass(frozen=True)
class Budget:
    """What was asked for: `amount` is bytes, or bits per weight; `context` is for what memory the cache is counted.

    `text` is how the user has said it.
    """

    kind: Kind
    amount: Decimal
    text: str
    context: int = CONTEXT

    @property
    def option(self) -> str:
        """The option that says the same on the command line."""
        context = f" --context {self.context}" if self.context != CONTEXT else ""
        return f"--{self.kind} {self.text}{context}"

    @property
    def name(self) -> str:
        """What a recipe for it is called: memory-96gb, size-85gb, bits-2.9."""
        context = f"-context-{self.context}" if self.context != CONTEXT else ""
        return f"{self.kind}-{self.text.strip().lower().replace(' ', '')}{context}"

    def limit(self, config: ModelConfig) -> int:
        """The most bytes that a file of this model may have; BudgetError where the engine itself takes all of them."""
        if self.kind == "bits":
            return math.floor(self.amount * weights_of(config) / 8)
        if self.kind == "size":
            return int(self.amount)
        if self.context > (longest := min(CONTEXT, config.max_position_embeddings)):
            raise BudgetError(
                f"--context {self.context} is more than the {longest} tokens that the engine runs this model with",
                hint=f"give --context {longest} or less",
            )
        besides = cache_bytes(config, self.context) + HEADROOM
        if self.amount <= besides:
            raise BudgetError(
                f"--memory {self.text} is taken by the engine alone: it needs {besides / 1e9:.1f} GB besides the file, "
                f"of which the cache of {self.context} tokens takes {(besides - HEADROOM) / 1e9:.1f} GB",
                hint="mq-quant tiers lists what memory each tier needs",
            )
        return int(self.amount) - besides

    def for_file(self, total_bytes: int, config: ModelConfig, rounded: Callable[[Decimal], int]) -> str:
        """The option that asks for a file of about so many bytes, `rounded` up or down."""
        amount = Decimal(total_bytes)
        if self.kind == "bits":
            return f"--bits {rounded(80000 * amount / weights_of(config)) / 1e4:.7g}"
        if self.kind == "memory":
            amount += cache_bytes(config, self.context) + HEADROOM
        unit, size = ("GB", 10**9) if amount >= 10**9 else ("MB", 10**6)
        return f"--{self.kind} {rounded(100 * amount / size) / 100:.7g}{unit}"


def weights_of(config: ModelConfig) -> int:
    """The number of weights of a model."""
    return sum(math.prod(spec.shape) for spec in inventory(config))


def read_budget(
    memory: str | None, size: str | None, bits: float | None, context: int | None
) -> Budget | None:
    """The budget of these options, of which one at most may be given; None where none is. Raises BudgetError."""
    given = {
        f"--{kind}": value
        for kind, value in (("memory", memory), ("size", size), ("bits", bits))
        if value is not None
    }
    if len(given) > 1:
        raise BudgetError(f"{' and '.join(given)} all say how large the file may be", hint="give one of them")
    if context is not None and memory is None:
        raise BudgetError(
            "--context goes with --memory, from which the cache is subtracted", hint="leave it out"
        )
    if context is not None and context < 1:
        raise BudgetError(f"--context {context} is no number of tokens", hint=f"give 1 to {CONTEXT}")
    if memory is not None:
        return Budget("memory", read_size(memory, "--memory"), memory, context or CONTEXT)
    if size is not None:
        return Budget("size", read_size(size, "--size"), size)
    if bits is not None:
        if not (math.isfinite(bits) and bits > 0):
            raise BudgetError(f"--bits {bits} is no number of bits per weight", hint="give one such as 2.9")
        return Budget("bits", Decimal(repr(bits)), f"{bits:g}")
    return None


def read_size(text: str, option: str) -> Decimal:
    """Whole bytes of a size such as 85.0GB or 79200000000B, rounded down; BudgetError where it is none."""
    match = _SIZE.fullmatch(text) if len(text) <= DIGITS else None
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        unit = (
            f"the unit {match[2]!r} is not known"
            if match and match[2]
            else "it has no unit"
            if match
            else "it is no size"
        )
        point = ", with a point and no comma" if "," in text else ""
        raise BudgetError(
            f"{option} {text[:DIGITS]!r}: {unit}",
            hint=f"give a number with B, kB, MB, GB, TB, MiB or GiB, as in 96GB, 85.5GB or 79200000000B{point}",
        )
    return Decimal(math.floor(Decimal(match[1]) * factor))
