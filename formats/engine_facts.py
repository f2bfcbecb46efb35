"""What the engine does with experts in each block format and version: runs them, runs them wrongly, or slowly.

The facts stand in engine_facts.toml, each with its source. `engine_rules` says what a file may hold at all; a fact says
what a user of such a file will meet. Plans, builds and cards warn of `concerns`.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from .blocks import BY_NAME, FORMATS
from .errors import MqError
from .minimax import TensorSpec

Projection = Literal["gate and up", "down"]
State = Literal["runs", "wrong", "fails", "slow"]
WARNED: tuple[State, ...] = ("wrong", "fails", "slow")
"""The states that a user is told of, the worst first."""
_HOW: Mapping[State, str] = {
    "runs": "runs",
    "wrong": "computes wrong results with",
    "fails": "cannot run",
    "slow": "is slow with",
}
_COLUMNS: Mapping[str, Callable[[int], bool]] = {
    "any": lambda columns: True,
    "over 512": lambda columns: columns > 512,
    "not of 1024": lambda columns: columns % 1024 != 0,
}
_CHOICES = {"projection": get_args(Projection), "state": get_args(State), "columns": tuple(_COLUMNS)}
_REQUIRED = ("projection", "formats", "state", "seen", "what", "source")
_OPTIONAL = ("since", "until", "columns", "way_out")


class EngineFactError(MqError):
    """A table of engine facts that does not follow its own form."""


@dataclass(frozen=True)
class EngineFact:
    """One line of the table. It holds on the engine's main branch from `since` (None: always) until `until` (None: at
    least to `seen`), for rows whose number of columns `columns` names.
    """

    projection: Projection
    formats: tuple[str, ...]
    state: State
    seen: datetime.date
    what: str
    source: str
    since: datetime.date | None = None
    until: datetime.date | None = None
    columns: str = "any"
    way_out: str = ""

    def concerns(self, projection: Projection, fmt: str, columns: int) -> bool:
        """Whether it is about matrices of this projection and format with so many columns."""
        return projection == self.projection and fmt in self.formats and _COLUMNS[self.columns](columns)

    @property
    def when(self) -> str:
        """The versions of the engine for which it holds, in words."""
        if self.since is None:
            return (
                f"hipfire before {day(self.until)}"
                if self.until
                else "every hipfire version that was looked at"
            )
        if self.until is None:
            return f"hipfire since {day(self.since)} (still so on {day(self.seen)})"
        return f"hipfire from {day(self.since)} until {day(self.until)}"

    @property
    def sentence(self) -> str:
        """What it says, without the way out."""
        return (
            f"{self.when} {_HOW[self.state]} {self.projection} in {' and '.join(self.formats)}: {self.what}"
        )

    @property
    def warning(self) -> str:
        """The sentence, and what to do."""
        return f"{self.sentence}; {self.way_out}" if self.way_out else self.sentence


def day(date: datetime.date) -> str:
    """A date as text says it: 11 July 2026."""
    return f"{date.day} {date:%B} {date.year}"


@cache
def engine_facts() -> tuple[EngineFact, ...]:
    """The bundled table."""
    text = files(__name__.rpartition(".")[0]).joinpath("engine_facts.toml").read_text("utf-8")
    return parse_facts(text, "engine_facts.toml")


def parse_facts(text: str, where: str) -> tuple[EngineFact, ...]:
    """A table of facts from TOML; EngineFactError, with the number of the fact, for anything that is not one."""
    try:
        rows = tomllib.loads(text).get("fact")
    except tomllib.TOMLDecodeError as e:
        raise EngineFactError(f"is no TOML: {e}", file=where) from None
    if not isinstance(rows, list) or not rows:
        raise EngineFactError("holds no [[fact]]", file=where)
    return tuple(_fact(row, f"fact {i}", where) for i, row in enumerate(rows, 1))


def _fact(row: Mapping[str, Any], name: str, where: str) -> EngineFact:
    def refuse(problem: str) -> EngineFactError:
        return EngineFactError(f"{name}: {problem}", file=where, hint="correct the table")

    if missing := [key for key in _REQUIRED if key not in row]:
        raise refuse(f"{missing[0]} is missing")
    if unknown := sorted(set(row) - {*_REQUIRED, *_OPTIONAL}):
        raise refuse(f"unknown key {unknown[0]}")
    for key in ("seen", "since", "until"):
        if key in row and type(row[key]) is not datetime.date:
            raise refuse(f"{key} is no date")
    for key, allowed in _CHOICES.items():
        if key in row and row[key] not in allowed:
            raise refuse(f"{key} is {row[key]!r}, not one of {', '.join(allowed)}")
    formats = row["formats"]
    if not isinstance(formats, list) or not formats or not all(fmt in BY_NAME for fmt in formats):
        raise refuse("formats is not a list of block formats")
    if row["state"] in ("wrong", "fails") and not row.get("way_out"):
        raise refuse("way_out is missing, and a user of such a file needs one")
    return EngineFact(**{**row, "formats": tuple(formats)})


def concerns(experts: Iterable[tuple[TensorSpec, int]]) -> tuple[EngineFact, ...]:
    """The facts that a user of these tensors, with their quant types, must know of: each once, the worst first."""
    kinds = dict.fromkeys(_kinds(experts))
    found = [
        fact
        for fact in engine_facts()
        if fact.state in WARNED and any(fact.concerns(*kind) for kind in kinds)
    ]
    return tuple(sorted(found, key=lambda fact: WARNED.index(fact.state)))


def _kinds(tensors: Iterable[tuple[TensorSpec, int]]) -> Iterator[tuple[Projection, str, int]]:
    for spec, quant_type in tensors:
        if spec.role == "expert" and quant_type in FORMATS:
            yield (
                "down" if spec.projection == "w2" else "gate and up",
                FORMATS[quant_type].name,
                spec.shape[-1],
            )
