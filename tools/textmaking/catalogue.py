"""texts/sources.toml as objects: every source with its archive and licence, and what is picked from it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALIBRATION, EVALUATION = "calibration", "evaluation"
USES = (CALIBRATION, EVALUATION)


@dataclass(frozen=True)
class Pick:
    """Files of one source that become documents of one kind, up to `kilobytes` (1000 bytes each) in all.

    A document is cut into pieces of at most `limit` bytes, of which at most `parts` are taken from one file.
    """

    source: str
    use: str
    kind: str
    form: str
    files: tuple[str, ...]
    kilobytes: float
    skip: tuple[str, ...] = ()
    limit: int = 8000
    parts: int = 4
    language: str = "english"


@dataclass(frozen=True)
class Source:
    """A published archive (`channel` pypi, npm or debian), or the project itself (`channel` own)."""

    name: str
    channel: str
    licence: str
    licence_files: tuple[str, ...]
    picks: tuple[Pick, ...]
    package: str = ""
    version: str = ""
    archive: str = ""
    sha256: str = ""
    note: str = ""


def _pick(source: str, table: dict[str, Any]) -> Pick:
    rest = {key: table[key] for key in ("use", "kind", "form", "limit", "parts", "language") if key in table}
    return Pick(
        source, files=tuple(table["files"]), skip=tuple(table.get("skip", ())), kilobytes=table["kB"], **rest
    )


def load(path: Path) -> list[Source]:
    """The sources of the catalogue at `path`, in its order."""
    sources = []
    for table in tomllib.loads(path.read_text("utf-8"))["source"]:
        picks = tuple(_pick(table["name"], pick) for pick in table.pop("picks"))
        if bad := [pick for pick in picks if pick.use not in USES]:
            raise ValueError(
                f"{path}: the use of a pick of {table['name']} is {bad[0].use!r}, not one of {USES}"
            )
        sources.append(Source(**{**table, "licence_files": tuple(table["licence_files"])}, picks=picks))
    return sources
