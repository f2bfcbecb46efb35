"""Launches of the kernels in levels.hip. A matrix is held as codes u8 [groups, 256] and heads f32 [groups, n]: n levels
or, of an `even` grid, scale and zero.
"""

from __future__ import annotations

from ..runtime.block_table import BLOCK_THREADS, WAVE
from ..runtime.host import Argument, Backend, Buffer

_WAVES = BLOCK_THREADS // WAVE


def spread_levels(backend: Backend, values: Buffer, codes: Buffer, heads: Buffer, even: bool) -> None:
    """values f32 [groups, 256]: the bits of `Format.decode`."""
    _launch(backend, "spread_levels", (values, codes, heads), heads, even)


def level_gradients(backend: Backend, out: Buffer, gradients: Buffer, codes: Buffer, even: bool) -> None:
    """out f32 [groups, n], the gradients of heads, from those of values f32 [groups, 256]. n is at most 32."""
    _launch(backend, "level_gradients", (out, gradients, codes), out, even)


def _launch(backend: Backend, name: str, buffers: tuple[Buffer, ...], heads: Buffer, even: bool) -> None:
    groups, count = heads.shape
    args: tuple[Argument, ...] = (*buffers, int(even), count, groups)
    backend.launch(backend.kernel(name), (-(-groups // _WAVES),), (BLOCK_THREADS,), args)
