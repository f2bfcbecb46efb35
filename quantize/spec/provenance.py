"""What a file says it was made from: program, recipe, source and imatrix.

No paths, times or machines are recorded, so that the same arguments give the same bytes wherever they run.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")
ROOT = Path(__file__).parents[2]
DECIDING = (
    "formats",
    "awq",
    "lloyd",
    "kernels",
    "verify/model",
    *(f"quantize/{r}" for r in ("spec", "encode", "calibrate", "tune", "pipeline")),
)
"""The rooms whose sources decide bytes."""
_LIBRARIES = ("numpy", "numba", "scipy")


@cache
def program() -> dict[str, Any]:
    """The program's name, version and, when it runs from a checkout, its commit."""
    return {"name": "mq-quant", "version": version("mq-quant"), "commit": _commit(ROOT)}


@cache
def code() -> dict[str, str]:
    """What of the program decides bytes: a hash of the sources that do, and the versions of the libraries that compute.

    Unfinished work is continued only under the same ones. A finished file does not record them.
    """
    digest = hashlib.sha256()
    for room in DECIDING:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".hip", ".h"):
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {"sources": digest.hexdigest()[:16], **{name: version(name) for name in _LIBRARIES}}


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
