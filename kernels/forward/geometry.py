"""How the forward pass's launches are cut into blocks, and `forward_constants.h`, the header that tells the kernels."""

from __future__ import annotations

from collections.abc import Mapping

from ..runtime.block_table import Number, declare

CHUNK = 12
"""Groups of x that a block of a product has in LDS at a time."""
MATRIX_THREADS = 128
"""Threads of a block that decodes, or multiplies one matrix."""
EXPERT_THREADS = 384
"""Threads of a block that multiplies experts' matrices, at most."""
RESIDENT_THREADS = 768
"""Threads of a multiprocessor for which products are given registers, where a vendor's header can say so."""
ATTENTION_THREADS = 128
"""Threads of a block of attention, and keys that it scores at a time."""
MAX_HEAD_DIM = 256
"""Dimensions of a head, at most."""
WHOLE: Mapping[str, int] = {"MQ2-Lloyd": 2, "MQ3-Lloyd": 1}
"""By format, of how many matrices LDS may hold all rows of a block at once; products of more matrices take the ring."""
RING_STEP = 2
"""Groups of a stage of the ring through which rows come that LDS does not hold."""
RING_DEPTH = 3
"""Stages of the ring."""
COPYING_WAVES: Mapping[tuple[str, str], int] = {
    ("expert_gate_up", "MQ2-Lloyd"): 7,
    ("expert_gate_up", "MQ3-Lloyd"): 12,
    ("expert_down", "MQ2-Lloyd"): 6,
    ("expert_down", "MQ3-Lloyd"): 8,
}
"""By product and format, the waves of a block whose rows a back end copies into LDS. Found best on an H100."""

CONSTANTS: Mapping[str, Number] = {
    "CHUNK": CHUNK,
    "MATRIX_THREADS": MATRIX_THREADS,
    "EXPERT_THREADS": EXPERT_THREADS,
    "RESIDENT_THREADS": RESIDENT_THREADS,
    "ATTENTION_THREADS": ATTENTION_THREADS,
    "MAX_HEAD_DIM": MAX_HEAD_DIM,
    "RING_STEP": RING_STEP,
    "RING_DEPTH": RING_DEPTH,
    **{f"WHOLE_{name.replace('-', '_')}": count for name, count in WHOLE.items()},
}


def header() -> str:
    """The text of `forward_constants.h`."""
    return declare(CONSTANTS)
