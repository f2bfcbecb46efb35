"""Profiles of the World Factbook, and conversations about them with JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from textmaking.catalogue import Pick
from textmaking.chat import Turn, phrase, render

_PERSONS = re.compile(r"diplomatic|executive|legislative|political|leaders|judicial", re.IGNORECASE)
"""Fields of the World Factbook that name living persons."""


def _plain(value: Any) -> Any:
    """A World Factbook value without its {"text": …} leaves and without what is empty; None where all is."""
    if isinstance(value, dict):
        inner = {"note" if key == "text" else key: _plain(v) for key, v in value.items()}
        kept = {key: v for key, v in inner.items() if v}
        return next(iter(kept.values())) if set(value) == {"text"} and kept else kept or None
    return re.sub(r"\s*\+\+\s*", "; ", value).strip(" ;") if isinstance(value, str) else None


def profile(text: str) -> dict[str, dict[str, Any]]:
    """{section: {field: text, or texts by name}} of a World Factbook entry, without persons."""
    sections = {}
    for section, fields in json.loads(text).items():
        values = {name: _plain(value) for name, value in fields.items() if not _PERSONS.search(name)}
        if kept := {name: value for name, value in values.items() if value}:
            sections[section] = kept
    return sections


def country_of(entry: dict[str, Any]) -> str:
    """The usual name of the country or place of a World Factbook profile."""
    names = entry.get("Government", {}).get("Country name", {})
    for key in ("conventional short form", "conventional long form"):
        if isinstance(names, dict) and (text := names.get(key, "none")).lower() not in ("none", "na"):
            return str(text)
    return "This territory"


def _fields(entry: dict[str, Any]) -> list[tuple[str, Any]]:
    """(field, value) of the fields of a profile that are short enough to be looked up."""
    fields = [field for content in entry.values() for field in content.items()]
    return [(name, value) for name, value in fields if 15 <= len(json.dumps(value)) <= 1200]


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_told(inner)}" for key, inner in value.items())
    return str(value)


_TELL = (
    "Please look up {1} of {0}.",
    "What is known about {0}: {1}?",
    "For a school paper I need facts about {0}: {1}.",
    "Tell me about {0}, please: {1}.",
    "{0}: {1}. What are the figures?",
)
_ASK_TOOL = (
    "One call brings all of it.",
    "The profile of the country has these fields. I ask for them in one call.",
    "Figures change, so I take them from the profile and not from memory.",
)
_REPORT = (
    "Now a list of them.",
    "All fields are there. I report them one after the other, with their units.",
    "The answer is complete; I put it into short lines.",
)


def lookup(files: Sequence[tuple[str, str]], pick: Pick) -> Iterator[tuple[str, str]]:
    """Questions about a country, each answered after a call of `get_country`."""
    for path, text in files:
        entry = profile(text)
        country, fields = country_of(entry), _fields(entry)
        fields.sort(key=lambda f: hashlib.sha256(f"{path}{f[0]}".encode()).digest())
        for first in range(0, min(len(fields), 18) - 8, 9):
            turns = []
            for some in (
                fields[first : first + 3],
                fields[first + 3 : first + 5],
                fields[first + 5 : first + 9],
            ):
                names = [name for name, _ in some]
                asked = ", ".join(name.lower() for name in names)
                answer = "\n".join(f"- **{name}**: {_told(value)}" for name, value in some)
                turns += [
                    Turn("user", phrase(_TELL, pick, path, asked).format(country, asked)),
                    Turn(
                        "ai",
                        thought=phrase(_ASK_TOOL, pick, path, first),
                        calls=[("get_country", {"country": country, "fields": names})],
                    ),
                    Turn("tool", json.dumps(dict(some), ensure_ascii=False)),
                    Turn("ai", f"{country}:\n\n{answer}", phrase(_REPORT, pick, first, path)),
                ]
            yield f"{path}#{first}", render(turns, path, first, tools=("get_country",))


_EXTRACT = (
    "Turn this into JSON with the keys {}.",
    "Extract {} from this text as JSON.",
    "Read the text and return a JSON object with the keys {}, and nothing else.",
    "I need {} out of the following lines, as one JSON object.",
)


def extraction(files: Sequence[tuple[str, str]], pick: Pick) -> Iterator[tuple[str, str]]:
    """The user gives lines of text and the keys; the model answers with JSON."""
    for path, text in files:
        entry = profile(text)
        country, fields = country_of(entry), _fields(entry)
        fields.sort(key=lambda f: hashlib.sha256(f"{f[0]}{path}".encode()).digest())
        some = [f for f in fields if isinstance(f[1], dict)][:4] + [
            f for f in fields if isinstance(f[1], str)
        ][:4]
        keys = {re.sub(r"\W+", "_", name.lower()).strip("_"): value for name, value in some}
        lines = "\n".join(f"{name}: {_told(value)}" for name, value in some)
        asked = ", ".join(f"`{key}`" for key in keys)
        answer = json.dumps({"country": country, **keys}, indent=2, ensure_ascii=False)
        turns = [
            Turn("user", f"{phrase(_EXTRACT, pick, path).format(asked)}\n\n{country}\n{lines}"),
            Turn(
                "ai",
                f"```json\n{answer}\n```",
                f"{len(keys)} keys are wanted, and the country's name helps too.",
            ),
        ]
        yield path, render(turns, path, "extraction")
