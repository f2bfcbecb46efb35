"""How the forward pass's launches are cut into blocks, and `forward_constants.h`, the header that tells the kernels."""

from __future__ import annotations

from collections.abc import Mapping

from ..runtime.block_table import Number, declare

CHUNK = 12
"""Groups of x that a block of a product has in LDS at a time."""
MATRIX_THREADS = 128
"""Threads of a block that decodes, or multiplies one matrix."""
WAVES = 12
"""Waves of a block that multiply experts' rows which are streamed through LDS; one more copies, and one adds up."""
EXPERT_THREADS = 32 * (WAVES + 2)
"""Threads of a block that multiplies experts' matrices, at most."""
DIRECT_THREADS = 384
"""The same where no rows are streamed."""
RESIDENT_THREADS = 2 * DIRECT_THREADS
"""Threads of a multiprocessor for which products are given registers, where a vendor's header can say so."""
ATTENTION_THREADS = 128
"""Threads of a block of attention, and keys that it scores at a time."""
MAX_HEAD_DIM = 256
"""Dimensions of a head, at most."""
WAVE_ROWS: Mapping[str, int] = {"MQ4": 8, "MQ6": 8, "Q8F16": 8, "MQ3-Lloyd": 16, "MQ2-Lloyd": 16}
"""By format that is streamed, the run of rows that a wave multiplies at a time."""
SHARE = 6
"""Groups of a row that a wave multiplies, at most, of rows that are streamed. Found best on an H200."""
MOST_RUNS = 4
"""Runs in a stage of the ring where a wave has all groups of a run. Where waves share a run, a stage has fewer."""
MOST_STAGES = 12
"""Stages of the ring, at most."""
CONFLICT, SHIFTED, SHIFT = 64, 4, 16
"""Rows of a multiple of CONFLICT bytes meet in the banks of LDS: each SHIFTED of them are put SHIFT bytes further."""

CONSTANTS: Mapping[str, Number] = {
    "CHUNK": CHUNK,
    "MATRIX_THREADS": MATRIX_THREADS,
    "EXPERT_THREADS": EXPERT_THREADS,
    "DIRECT_THREADS": DIRECT_THREADS,
    "RESIDENT_THREADS": RESIDENT_THREADS,
    "ATTENTION_THREADS": ATTENTION_THREADS,
    "MAX_HEAD_DIM": MAX_HEAD_DIM,
    "SHARE": SHARE,
    "MOST_STAGES": MOST_STAGES,
    "MOST_RUNS": MOST_RUNS,
    "CONFLICT": CONFLICT,
    "SHIFTED": SHIFTED,
    "SHIFT": SHIFT,
}


def header() -> str:
    """The text of `forward_constants.h`."""
    return declare(CONSTANTS)
