"""What may have been meant by the path of a file that is not there."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path


def near_file(path: Path) -> str | None:
    """A hint: a file of nearly this name in the same folder, or that there is no such folder; else None."""
    try:
        names = [found.name for found in path.parent.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no folder {path.parent}"
    except OSError:
        return None
    near = [] if path.name in names else get_close_matches(path.name, names, n=1)
    return f"there is {path.with_name(near[0])}, whose name is nearly the same" if near else None
