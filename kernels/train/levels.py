"""Launches of the kernels in levels.hip. Matrices are held as codes u8 [matrices, groups, 256]; those that are
`chosen` i32 [m] take part, with heads f32 [m, groups, n]: n levels or, of an `even` grid, scale and zero. Values are
f32, or bf16 as u16.
"""

from __future__ import annotations

import numpy as np

from ..runtime.block_table import BLOCK_THREADS, WAVE
from ..runtime.host import Argument, Backend, Buffer

_WAVES = BLOCK_THREADS // WAVE
_SUFFIXES = {np.dtype(np.float32): "f32", np.dtype(np.uint16): "bf16"}


def spread_levels(
    backend: Backend, values: Buffer, codes: Buffer, heads: Buffer, chosen: Buffer, even: bool
) -> None:
    """values [m, groups, 256]: the bits of `Format.decode`, or those rounded to bf16."""
    _launch(backend, "spread_levels", values, (values, codes, heads, chosen), heads, even)


def level_gradients(
    backend: Backend, out: Buffer, gradients: Buffer, codes: Buffer, chosen: Buffer, even: bool
) -> None:
    """out f32 [m, groups, n], the gradients of heads, from those of values [m, groups, 256]. n is at most 32."""
    _launch(backend, "level_gradients", gradients, (out, gradients, codes, chosen), out, even)


def _launch(
    backend: Backend, name: str, values: Buffer, buffers: tuple[Buffer, ...], heads: Buffer, even: bool
) -> None:
    chosen, each, count = heads.shape
    groups = chosen * each
    args: tuple[Argument, ...] = (*buffers, int(even), count, each, groups)
    kernel = backend.kernel(f"{name}_{_SUFFIXES[values.dtype]}")
    backend.launch(kernel, (-(-groups // _WAVES),), (BLOCK_THREADS,), args)
