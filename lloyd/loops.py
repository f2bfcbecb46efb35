"""The decorator of this room's compiled loops: their machine code is kept under the digest of the room's sources."""

from __future__ import annotations

from pathlib import Path

from ..formats import fwht
from ..formats.jit import compiler

compiled = compiler(Path(__file__).parent, Path(fwht.__file__))
