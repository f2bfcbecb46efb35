"""The header `block_table.h`, which gives every kernel the sizes of waves, groups and block formats.

The formats' bytes, codes and levels come from formats/blocks.py and the group from formats/fwht.py, so that no kernel
repeats them. How lanes read a block is said here, for kernels and host alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...formats.blocks import BY_NAME, AffineFormat, Format
from ...formats.fwht import GROUP

Number = int | float | np.float32

WAVE = 32
"""Lanes of a wave, on every device."""
PER_LANE = GROUP // WAVE
"""Elements of a group that one lane of a wave holds: lane t has 8t … 8t + 7."""
MAX_THREADS = 1024
"""Threads of a block, at most."""
MAX_LDS = 64 << 10
"""Bytes of LDS of a block, at most, on devices that say nothing else."""
BLOCK_THREADS = 256
"""Threads of a block of kernels to which another number would be no better."""
SLICES: Mapping[str, tuple[int, int]] = {
    name: {"F32": (8, 2), "F16": (8, 2), "Q8F16": (8, 4)}.get(name, (32, 2)) for name in BY_NAME
}
"""By format, (SLICE, ROWS): elements of a group that a lane reads, and rows that a team of lanes works on at a time."""
COUNTED: Mapping[str, tuple[int, int]] = {"MQ2-Lloyd": (64, 2), "MQ3-Lloyd": (64, 2)}
"""The same for formats that devices with tiles of bits multiply by counting (forward/bits.h)."""

CONSTANTS: Mapping[str, Number] = {
    "WAVE": WAVE,
    "GROUP": GROUP,
    "GROUP_BITS": GROUP.bit_length() - 1,
    "PER_LANE": PER_LANE,
    "MAX_THREADS": MAX_THREADS,
    "MAX_LDS": MAX_LDS,
    "BLOCK_THREADS": BLOCK_THREADS,
    "ROTATION_SCALE": np.float32(1 / np.sqrt(GROUP)),
}


def declare(constants: Mapping[str, Number]) -> str:
    """A line of C++ for each constant: int for an int, float for an np.float32, double for a Python float."""
    return "".join(f"constexpr {_value(name, value)};\n" for name, value in constants.items())


def _value(name: str, value: Number) -> str:
    if isinstance(value, int):
        return f"int {name} = {value}"
    digits = float(value).hex()
    return f"double {name} = {digits}" if isinstance(value, float) else f"float {name} = {digits}f"


def struct(fmt: Format) -> str:
    """A struct of one block format's numbers, in the namespace `blocks`; '-' in its name becomes '_'.

    BYTES counts a group of 256 weights, BLOCK and BLOCK_WEIGHTS one block; HEAD bytes of a block come before its codes
    of BITS bits; VALUE is the size of formats of single values, else 0.
    """
    bits = max(0, fmt.levels.bit_length() - 1)
    slice_, rows = SLICES[fmt.name]
    numbers = {
        "BYTES": fmt.nbytes(GROUP),
        "BLOCK": fmt.group_bytes,
        "BLOCK_WEIGHTS": fmt.group,
        "HEAD": fmt.group_bytes - fmt.group * bits // 8 if bits else 0,
        "VALUE": 0 if bits else fmt.group_bytes,
        "BITS": bits,
        "LEVELS": fmt.levels,
        "SLICE": slice_,
        "ROWS": rows,
    }
    if fmt.name in COUNTED:
        numbers |= dict(zip(("COUNTED_SLICE", "COUNTED_ROWS"), COUNTED[fmt.name], strict=True))
    fields = ", ".join(f"{name} = {value}" for name, value in numbers.items())
    grid = "true" if isinstance(fmt, AffineFormat) else "false"
    name = fmt.name.replace("-", "_")
    return (
        f"struct {name} {{\n  static constexpr int {fields};\n  static constexpr bool GRID = {grid};\n}};\n"
    )


def header() -> str:
    """The text of `block_table.h`."""
    structs = "".join(map(struct, BY_NAME.values()))
    return f"{declare(CONSTANTS)}namespace blocks {{\n{structs}}}  // namespace blocks\n"
