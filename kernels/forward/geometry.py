"""How the forward pass's launches are cut into blocks, and `forward_constants.h`, the header that tells the kernels."""

from __future__ import annotations

from collections.abc import Mapping

from ..runtime.block_table import Number, declare

CHUNK = 12
"""Groups of x that a block of a product has in LDS at a time."""
MATRIX_THREADS = 128
"""Threads of a block that decodes, or multiplies one matrix."""
EXPERT_THREADS = 32 * (CHUNK + 1)
"""Threads of a block that multiplies experts' matrices: at most a wave for each of CHUNK groups, and one that copies."""
DIRECT_THREADS = 384
"""The same where rows come directly."""
RESIDENT_THREADS = 2 * EXPERT_THREADS
"""Threads of a multiprocessor for which products are given registers, where a vendor's header can say so."""
ATTENTION_THREADS = 128
"""Threads of a block of attention, and keys that it scores at a time."""
MAX_HEAD_DIM = 256
"""Dimensions of a head, at most."""
WAVE_ROWS: Mapping[str, int] = {"MQ4": 8, "MQ6": 8, "Q8F16": 8, "MQ2-Lloyd": 16, "MQ3-Lloyd": 16}
"""By format, rows that a wave multiplies at a time of those that come through a ring in LDS; others come directly."""
MOST_STAGES = 8
"""Stages of the ring, at most."""
BATCH = 4
"""Tiles whose sums over groups are made at once."""
LEAD = 1
"""Tiles that a block has left to ask for when the next kernel may begin."""
ROW_CONFLICT = 64
"""Rows of a multiple of so many bytes meet in the banks of LDS, and are put ROW_SHIFT bytes further apart."""
ROW_SHIFT = 16

CONSTANTS: Mapping[str, Number] = {
    "CHUNK": CHUNK,
    "MATRIX_THREADS": MATRIX_THREADS,
    "EXPERT_THREADS": EXPERT_THREADS,
    "RESIDENT_THREADS": RESIDENT_THREADS,
    "ATTENTION_THREADS": ATTENTION_THREADS,
    "MAX_HEAD_DIM": MAX_HEAD_DIM,
    "MOST_STAGES": MOST_STAGES,
    "BATCH": BATCH,
    "LEAD": LEAD,
    "ROW_CONFLICT": ROW_CONFLICT,
    "ROW_SHIFT": ROW_SHIFT,
}


def header() -> str:
    """The text of `forward_constants.h`."""
    return declare(CONSTANTS)
