"""What a file says it was made from: program, recipe, source and imatrix. No paths, times or machines are recorded,
so that the same job gives the same bytes wherever it runs. Standard library only.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")


@cache
def program() -> dict[str, Any]:
    """The program's name, version and, when it runs from a checkout, its commit."""
    return {
        "name": "mq-quant",
        "version": version("mq-quant"),
        "commit": _commit(Path(__file__).parents[2]),
    }


def _commit(tree: Path) -> str | None:
    if not (tree / ".git").exists():
        return None
    command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return out if _COMMIT.fullmatch(out) else None


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects, their keys joined by dots; lists are leaves."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, part in value.items():
        yield from flatten(part, f"{prefix}.{key}" if prefix else str(key))
