"""The patterns of a recipe's rules: regular expressions that never take long, whoever wrote them.

A file says what recipe it was made with, so patterns of strangers are run. Python's own engine takes exponential time
for some of them. RE2 takes time in proportion to the name times the size of the pattern's program, and both are bounded
here. In exchange RE2 has no look-around and no back-references.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

LENGTH_LIMIT = 500
"""Characters of a pattern."""
PROGRAM_LIMIT = 1000
"""Steps of the program that RE2 makes of a pattern; those of the bundled recipes have at most 27."""

_ATOMS = r"(?:\\[.d]|[A-Za-z0-9_.^$]|\[[A-Za-z0-9_]+\])*"
_SIMPLE = re.compile(rf"{_ATOMS}(?:(?<![\^$])[*+]{_ATOMS})?")
"""Patterns with one repetition at most, and without groups: Python's engine is three times faster than RE2 for these,
and takes at most the square of the name's length. Those of the bundled recipes are such."""


@lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name holds the pattern, as a function of the name; ValueError for what is not a pattern."""
    import re2

    if len(pattern) > LENGTH_LIMIT:
        raise ValueError(f"has {len(pattern)} characters, more than {LENGTH_LIMIT}")
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(pattern.encode(), options=options)
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not a character") from None
    except re2.error as e:
        reason = e.args[0].decode("utf-8", "replace") if isinstance(e.args[0], bytes) else str(e)
        raise ValueError(
            f"is not a regular expression: {reason} (patterns are those of RE2: no look-around, no back-references)"
        ) from None
    if compiled.programsize > PROGRAM_LIMIT:
        raise ValueError(f"makes a program of {compiled.programsize} steps, more than {PROGRAM_LIMIT}")
    quick = re.compile(pattern, re.ASCII).search if _SIMPLE.fullmatch(pattern) else None
    search = compiled.search
    if quick is not None:
        return lambda name: quick(name) is not None
    return lambda name: search(name.encode()) is not None
