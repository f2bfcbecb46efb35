"""Running a compiler: its temporary files where they can be written, its errors as ours."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...formats.errors import BackendError

_SAID = 4000
"""Characters of what a compiler said that an error shows: the last ones."""


def run(
    command: Sequence[str], what: str, scratch: Path | None = None, settings: Mapping[str, str] | None = None
) -> str:
    """What a command printed; temporary files go to `scratch`, `settings` are variables of its environment.

    Raises BackendError, which begins with `what`, where the command cannot be run or fails.
    """
    environment = {**os.environ, "LC_ALL": "C", **(settings or {})}
    if scratch is not None:
        environment["TMPDIR"] = str(scratch)
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, ValueError) as e:
        said = getattr(e, "strerror", None) or e
        raise BackendError(f"{what}: {command[0]} cannot be run: {said}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-_SAID:]
        raise BackendError(f"{what}:\n{said}\n  by {' '.join(command)}")
    return done.stdout.decode(errors="replace")
