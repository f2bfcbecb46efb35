"""What a base model's own card declares: its licence, where that stands, its languages and its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...formats.errors import InputError
from ...formats.hub.files import fetch_files
from ...formats.plain_file import open_plain

README = "README.md"
LIMIT = 4 << 20
"""Bytes of a card that are read: its header stands at the beginning."""
PAGE = "https://huggingface.co/{}/blob/main/{}"


@dataclass(frozen=True)
class BaseModel:
    """A base model. `repository` is None where only a folder is known; fields that are not declared are None too."""

    repository: str | None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    pipeline: str = "text-generation"
    languages: tuple[str, ...] = ()


def base_model(repository: str | None, folder: Path | None) -> BaseModel:
    """What the card in a folder, or else of a repository, declares; without a card nothing is declared.

    Raises HubError where the repository does not answer, InputError where the card's header cannot be read.
    """
    if folder is not None:
        path = folder / README if (folder / README).is_file() else None
    elif repository is not None:
        path = fetch_files(repository, (README,)).get(README)
    else:
        path = None
    declared = _header(path) if path else {}
    return BaseModel(
        repository,
        _text(declared.get("license")),
        _text(declared.get("license_name")),
        _link(_text(declared.get("license_link")), repository),
        _text(declared.get("pipeline_tag")) or "text-generation",
        _texts(declared.get("language")),
    )


def _header(path: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines of dashes; empty where a card has none."""
    try:
        with open_plain(path) as f:
            text = f.read(LIMIT).decode("utf-8", "replace")
    except OSError as e:
        raise InputError(f"cannot be read: {e.strerror}", file=path) from None
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return {}
    end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
    try:
        found = yaml.safe_load("\n".join(lines[1:end]))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(
            "its YAML header cannot be read, and the licence stands there",
            file=path,
            hint="give --license and --license-link",
        ) from None
    return found if isinstance(found, Mapping) else {}


def _link(link: str | None, repository: str | None) -> str | None:
    """A link that leads somewhere from another repository too."""
    if link is None or link.startswith(("http://", "https://")) or repository is None:
        return link
    return PAGE.format(repository, link.removeprefix("./"))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.isprintable() and value else None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(filter(None, map(_text, values)))
