"""Importance matrices of the llama.cpp family: E[x²] per input channel of a weight, in GGUF or in the legacy .dat.

`read_imatrix` tells the two apart by content and reads entries when they are asked for. `expert_entry`, `check_imatrix`
and `coverage` find a model's experts among the entries. Values are handed on as the file has them, inf and NaN
included: what to do about those is the room `awq`'s part.
"""

from .entry import Imatrix, ImatrixEntry
from .experts import GGUF_NAMES, check_imatrix, coverage, expert_entry
from .read import read_imatrix
from .write import write_imatrix

__all__ = [
    "GGUF_NAMES",
    "Imatrix",
    "ImatrixEntry",
    "check_imatrix",
    "coverage",
    "expert_entry",
    "read_imatrix",
    "write_imatrix",
]
