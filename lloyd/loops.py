"""The decorators of this room's compiled loops: their machine code is kept under the digest of the room's sources."""

from __future__ import annotations

from pathlib import Path

from ..formats import fwht
from ..formats.jit import compiler

SOURCES = Path(__file__).parent, Path(fwht.__file__)
compiled = compiler(*SOURCES)
inlined = compiler(*SOURCES, inlined=True)
"""For loops that others are made of, and that make no arrays: each stands in the code of its callers, and counts no
references. Otherwise a call with a tuple of twenty arrays takes as long as what is done in it.
"""
