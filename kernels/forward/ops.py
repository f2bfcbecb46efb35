"""The kernels of the forward pass as functions of buffers. They choose grids and output shapes.

T is the number of tokens of a call (1 when decoding). Activations are f32 [T, n]. Wrong shapes raise BackendError
before anything runs. A function that is given `out` writes that buffer, and a new one otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...formats.blocks import BY_NAME
from ...formats.errors import BackendError
from ...formats.fwht import GROUP, SIGNS1, SIGNS2
from ..runtime.block_table import BLOCK_THREADS, SLICES, WAVE
from ..runtime.host import Argument, Backend, Buffer
from ..runtime.sources import Kernel
from .geometry import (
    CHUNK,
    CONFLICT,
    DIRECT_THREADS,
    MATRIX_THREADS,
    MAX_HEAD_DIM,
    MOST_RUNS,
    MOST_STAGES,
    SHARE,
    SHIFT,
    SHIFTED,
    WAVE_ROWS,
    WAVES,
)


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix on the device: `data` u8, one payload of `format` (a name of formats.blocks), [rows, cols]."""

    data: Buffer
    format: str
    rows: int
    cols: int


@dataclass(frozen=True)
class Experts:
    """One projection of a layer's experts, all [rows, cols] in `format`.

    `data` u8 holds the matrices, `offsets` i64 [experts] says at which byte each begins, -1 where it is not loaded: an
    expert that is not loaded gives NaN. Offsets are multiples of 8, or of 2 for Q8F16.
    """

    data: Buffer
    offsets: Buffer
    format: str
    rows: int
    cols: int
    aligned: bool
    """Whether every matrix begins and ends at a multiple of 16 bytes, which copies into LDS need."""


def matrix(backend: Backend, payload: NDArray[np.uint8], fmt: str, rows: int, cols: int) -> Matrix:
    """Upload a matrix's payload; BackendError where its size is not that of [rows, cols]."""
    _whole_groups(cols)
    expected = BY_NAME[fmt].nbytes(rows * cols)
    if payload.nbytes != expected:
        raise BackendError(
            f"a {fmt} matrix [{rows}, {cols}] has {expected} bytes, the payload {payload.nbytes}"
        )
    return Matrix(backend.upload(payload.reshape(-1).view(np.uint8)), fmt, rows, cols)


def experts(
    backend: Backend, data: Buffer, offsets: Sequence[int] | NDArray[np.int64], fmt: str, rows: int, cols: int
) -> Experts:
    """Describe expert matrices that lie in `data`; BackendError where one would reach outside it or is misaligned."""
    _whole_groups(cols)
    table = np.asarray(offsets, np.int64)
    size, align = BY_NAME[fmt].nbytes(rows * cols), 2 if fmt == "Q8F16" else 8
    loaded = table[table != -1]
    if loaded.size and (loaded.min() < 0 or loaded.max() + size > data.nbytes or (loaded % align).any()):
        raise BackendError(f"expert offsets do not fit {fmt} matrices of {size} bytes in {data.nbytes} bytes")
    aligned = size % 16 == 0 and not ((data.address + loaded) % 16).any()
    return Experts(data, backend.upload(table), fmt, rows, cols, aligned)


def signs(backend: Backend) -> Buffer:
    """The table that rotations need: f32 [2, 256]."""
    return backend.upload(np.stack([SIGNS1, SIGNS2]))


def rope_tables(
    positions: int, rotary_dim: int, theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin f32 [positions, rotary_dim/2] of angle = position · theta^(−2i/rotary_dim).

    Inverse frequencies and angles are f32 as in the reference implementation; the functions are evaluated in f64.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequency = (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)
    angle = np.arange(positions, dtype=np.float32)[:, None] * frequency[None, :]
    return np.cos(angle.astype(np.float64)).astype(np.float32), np.sin(angle.astype(np.float64)).astype(
        np.float32
    )


def decode(backend: Backend, payload: Buffer, fmt: str, n: int, out: Buffer | None = None) -> Buffer:
    """f32 [n]: the whole payload decoded in the stored basis."""
    expected = BY_NAME[fmt].nbytes(n)
    if payload.nbytes != expected:
        raise BackendError(f"{n} weights of {fmt} have {expected} bytes, the payload {payload.nbytes}")
    out = _out(backend, out, (n,), np.float32)
    _launch(backend, "decode", (_ceil(n, MATRIX_THREADS * SLICES[fmt][0]),), (out, payload, n), fmt)
    return out


def embed(backend: Backend, table: Matrix, ids: Buffer, out: Buffer | None = None) -> Buffer:
    """f32 [T, cols]: rows ids i32 [T] of the table."""
    (tokens,) = _shape(ids, "ids", 1)
    out = _out(backend, out, (tokens, table.cols), np.float32)
    groups = table.cols // GROUP
    grid = (_ceil(table.cols, MATRIX_THREADS * SLICES[table.format][0]), tokens)
    _launch(backend, "embed", grid, (out, table.data, ids, table.rows, groups), table.format)
    return out


def rmsnorm(backend: Backend, x: Buffer, weight: Buffer, eps: float, out: Buffer | None = None) -> Buffer:
    """f32 [T, n]: x · weight / sqrt(mean(x²) + eps) over each row; weight f32 [n]."""
    tokens, n = _shape(x, "x", 2)
    _fits(weight, "weight", (n,))
    out = _out(backend, out, (tokens, n), np.float32)
    _launch(backend, "rmsnorm", (tokens,), (out, x, weight, n, eps))
    return out


def matvec(backend: Backend, w: Matrix, x: Buffer, out: Buffer | None = None) -> Buffer:
    """f32 [T, rows] = w · x for x f32 [T, cols]."""
    tokens, cols = _shape(x, "x", 2)
    _fits(x, "x", (tokens, w.cols))
    out = _out(backend, out, (tokens, w.rows), np.float32)
    rows = _rows(backend, w.format, backend.kernel("matvec", w.format).threads // WAVE)
    _launch(
        backend, "matvec", (_ceil(w.rows, rows), tokens), (out, w.data, x, w.rows, cols // GROUP), w.format
    )
    return out


def rope(backend: Backend, x: Buffer, cos: Buffer, sin: Buffer, positions: Buffer, head_dim: int) -> None:
    """Rotate x f32 [T, heads·head_dim] in place; cos, sin f32 [P, rotary/2]; positions i32 [T], each below P."""
    tokens, width = _shape(x, "x", 2)
    _fits(positions, "positions", (tokens,))
    _, half = _shape(cos, "cos", 2)
    _fits(sin, "sin", cos.shape)
    if width % head_dim or 2 * half > head_dim:
        raise BackendError(
            f"rope of {2 * half} dimensions does not fit heads of {head_dim} in rows of {width}"
        )
    _launch(backend, "rope", (width // head_dim, tokens), (x, cos, sin, positions, head_dim, half))


def kv_append(
    backend: Backend, k_cache: Buffer, v_cache: Buffer, k: Buffer, v: Buffer, positions: Buffer
) -> None:
    """Write k, v f32 [T, n] into rows positions i32 [T] of the caches f32 [capacity, n]."""
    tokens, n = _shape(k, "k", 2)
    _fits(v, "v", (tokens, n))
    _fits(positions, "positions", (tokens,))
    capacity, _ = _shape(k_cache, "k_cache", 2)
    _fits(k_cache, "k_cache", (capacity, n))
    _fits(v_cache, "v_cache", (capacity, n))
    _launch(backend, "kv_append", (_ceil(n, BLOCK_THREADS), tokens), (k_cache, v_cache, k, v, positions, n))


def attention(
    backend: Backend,
    q: Buffer,
    k_cache: Buffer,
    v_cache: Buffer,
    positions: Buffer,
    head_dim: int,
    out: Buffer | None = None,
) -> Buffer:
    """f32 [T, heads·head_dim]: causal attention of q over rows 0 … positions[t] of the caches.

    Caches are f32 [capacity, kv_heads·head_dim], positions i32 [T] below capacity, heads of at most 256
    dimensions, a multiple of 4.
    """
    tokens, width = _shape(q, "q", 2)
    capacity, kv_width = _shape(k_cache, "k_cache", 2)
    _fits(v_cache, "v_cache", (capacity, kv_width))
    _fits(positions, "positions", (tokens,))
    heads, kv_heads = width // head_dim, kv_width // head_dim
    if (
        head_dim > MAX_HEAD_DIM
        or head_dim % 4
        or width % head_dim
        or kv_width % head_dim
        or not kv_heads
        or heads % kv_heads
    ):
        raise BackendError(
            f"attention does not fit heads of {head_dim} in q {q.shape} and a cache {k_cache.shape}"
        )
    out = _out(backend, out, (tokens, width), np.float32)
    scale = float(np.float32(1.0 / math.sqrt(head_dim)))
    _launch(
        backend,
        "attention",
        (heads, tokens),
        (out, q, k_cache, v_cache, positions, kv_heads, head_dim, scale),
    )
    return out


def router_top_k(backend: Backend, logits: Buffer, bias: Buffer, slots: int) -> tuple[Buffer, Buffer]:
    """(ids i32 [T, slots], weights f32 [T, slots]) from logits f32 [T, experts] and bias f32 [experts]."""
    tokens, n = _shape(logits, "logits", 2)
    _fits(bias, "bias", (n,))
    if not 0 < slots <= n:
        raise BackendError(f"{slots} experts cannot be chosen of {n}")
    ids, weights = backend.alloc((tokens, slots), np.int32), backend.alloc((tokens, slots), np.float32)
    _launch(backend, "router_top_k", (tokens,), (ids, weights, logits, bias, n, slots))
    return ids, weights


def scale_rotate(
    backend: Backend, x: Buffer, scale: Buffer, table: Buffer, rotated: bool = True, out: Buffer | None = None
) -> Buffer:
    """f32 [T, n] = FWHT256(x / scale); scale f32 [n], table = signs(). `rotated` False leaves the rotation out."""
    tokens, n = _shape(x, "x", 2)
    _whole_groups(n)
    _fits(scale, "scale", (n,))
    _fits(table, "signs", (2, GROUP))
    out = _out(backend, out, (tokens, n), np.float32)
    _launch(backend, "scale_rotate", (n // GROUP, tokens), (out, x, scale, table, int(rotated)))
    return out


def silu_mul_rotate(
    backend: Backend, gate: Buffer, up: Buffer, table: Buffer, rotated: bool = True, out: Buffer | None = None
) -> Buffer:
    """f32 like gate = FWHT256(silu(gate) ∘ up), per run of 256 of the last axis; table = signs()."""
    _whole_groups(gate.shape[-1])
    _fits(up, "up", gate.shape)
    _fits(table, "signs", (2, GROUP))
    out = _out(backend, out, gate.shape, np.float32)
    _launch(backend, "silu_mul_rotate", (gate.size // GROUP,), (out, gate, up, table, int(rotated)))
    return out


def expert_gate_up(
    backend: Backend, w1: Experts, w3: Experts, ids: Buffer, x: Buffer
) -> tuple[Buffer, Buffer]:
    """(gate, up) f32 [T, slots, rows] = W1, W3 of the experts ids i32 [T, slots], times x f32 [T, cols]."""
    tokens, slots = _shape(ids, "ids", 2)
    _fits(x, "x", (tokens, w1.cols))
    if (w1.format, w1.rows, w1.cols) != (w3.format, w3.rows, w3.cols):
        raise BackendError("w1 and w3 of a layer have one format and one shape")
    _fits(w3.offsets, "offsets of w3", w1.offsets.shape)
    gate = backend.alloc((tokens, slots, w1.rows), np.float32)
    up = backend.alloc((tokens, slots, w1.rows), np.float32)
    args = (gate, up, w1.data, w1.offsets, w3.data, w3.offsets, ids, x)
    _launch_experts(backend, "expert_gate_up", (w1, w3), (slots, tokens), args)
    return gate, up


def expert_down(backend: Backend, w2: Experts, ids: Buffer, x: Buffer, out: Buffer | None = None) -> Buffer:
    """f32 [T, slots, rows] = W2 of the experts ids i32 [T, slots], times x f32 [T, slots, cols]."""
    tokens, slots = _shape(ids, "ids", 2)
    _fits(x, "x", (tokens, slots, w2.cols))
    out = _out(backend, out, (tokens, slots, w2.rows), np.float32)
    _launch_experts(backend, "expert_down", (w2,), (slots, tokens), (out, w2.data, w2.offsets, ids, x))
    return out


def expert_mlp(
    backend: Backend,
    w: tuple[Experts, Experts, Experts],
    ids: Buffer,
    x: Buffer,
    table: Buffer,
    rotated: bool = True,
    out: Buffer | None = None,
) -> Buffer:
    """f32 [T, slots, H] = W2 · FWHT256(silu(W1 · x) ∘ W3 · x) of the experts ids i32 [T, slots], for x f32 [T, H].

    `w` is (W1, W3, W2), table = signs(). `rotated` False leaves the rotation out. Where W2 is streamed, its launch
    makes the activation too. The result is that of the launches one by one, bit for bit.
    """
    w1, w3, w2 = w
    gate, up = expert_gate_up(backend, w1, w3, ids, x)
    _fits(gate, "gate", (*ids.shape, w2.cols))
    kernel = backend.kernel("expert_activated_down", w2.format)
    if not _ring(backend, kernel, (w2,))[0]:
        return expert_down(backend, w2, ids, silu_mul_rotate(backend, gate, up, table, rotated), out)
    tokens, slots = ids.shape
    _fits(table, "signs", (2, GROUP))
    out = _out(backend, out, (tokens, slots, w2.rows), np.float32)
    args = (out, w2.data, w2.offsets, ids, gate, up, table)
    _launch_experts(backend, kernel.name, (w2,), (slots, tokens), args, (int(rotated),))
    return out


def combine(backend: Backend, h: Buffer, x: Buffer, weights: Buffer) -> None:
    """h f32 [T, n] += Σ weights[t, slot] · x[t, slot] in slot order; x f32 [T, slots, n], weights f32 [T, slots]."""
    tokens, slots, n = _shape(x, "x", 3)
    _fits(h, "h", (tokens, n))
    _fits(weights, "weights", (tokens, slots))
    _launch(backend, "combine", (_ceil(n, BLOCK_THREADS), tokens), (h, x, weights, slots, n))


def add(backend: Backend, h: Buffer, x: Buffer) -> None:
    """h += x, both f32 of one shape."""
    _fits(x, "x", h.shape)
    _launch(backend, "add", (_ceil(h.size, BLOCK_THREADS),), (h, x, h.size))


def _launch(
    backend: Backend, name: str, grid: Sequence[int], args: Sequence[Argument], fmt: str | None = None
) -> None:
    kernel = backend.kernel(name, fmt)
    backend.launch(kernel, grid, (kernel.threads,), args)


def _launch_experts(
    backend: Backend,
    name: str,
    w: Sequence[Experts],
    grid: tuple[int, int],
    args: Sequence[Argument],
    more: Sequence[int] = (),
) -> None:
    """Launch a product of one or two matrices of each expert, all of one shape, through LDS where that can be done.

    `more` are numbers that a kernel takes behind those of the shape.
    """
    first, kernel = w[0], backend.kernel(name, w[0].format)
    slots, tokens = grid
    stages, lds, tile = _ring(backend, kernel, w)
    if stages:
        tiles = _ceil(first.rows, tile)
        count = slots * tokens * len(w) * tiles
        blocks: tuple[int, ...] = (min(backend.multiprocessors, count),)
        waves, cut = WAVES + 2, (stages, tile, tiles, count // blocks[0])
    else:
        waves, cut = min(kernel.threads, DIRECT_THREADS) // WAVE, (0, 0, 0, 0)
        blocks = (_ceil(first.rows, _rows(backend, first.format, waves) // len(w)), *grid)
    shape = (first.offsets.size, first.rows, first.cols // GROUP, tokens, slots, *more)
    backend.launch(kernel, blocks, (waves * WAVE,), (*args, *shape, *cut), lds)


def _ring(backend: Backend, kernel: Kernel, w: Sequence[Experts]) -> tuple[int, int, int]:
    """(stages of the ring through which rows are streamed, bytes of LDS, rows of a stage); zeros where it cannot be."""
    first = w[0]
    if first.format not in WAVE_ROWS or first.cols // GROUP > CHUNK or not all(m.aligned for m in w):
        return 0, 0, 0
    line, members = BY_NAME[first.format].nbytes(first.cols), _ceil(first.cols // GROUP, SHARE)
    rows = MOST_RUNS // members * WAVE_ROWS[first.format]
    shift = 0 if line % CONFLICT or first.format in backend.slices else SHIFT
    stage = rows * (line + 2 * 8 * members) + rows // SHIFTED * shift
    stages = min(MOST_STAGES, backend.lds_for_copies(kernel) // stage)
    return (stages, stages * stage, rows) if stages > 1 else (0, 0, 0)


def _rows(backend: Backend, fmt: str, waves: int) -> int:
    """Rows that so many waves multiply: ROWS for each team of GROUP / SLICE lanes."""
    slice_, rows = SLICES[fmt]
    return waves * WAVE * backend.slices.get(fmt, slice_) // GROUP * rows


def _ceil(n: int, by: int) -> int:
    return -(-n // by)


def _whole_groups(cols: int) -> None:
    if cols % GROUP or cols <= 0:
        raise BackendError(f"a row of {cols} does not divide into groups of {GROUP}")


def _shape(buffer: Buffer, name: str, axes: int) -> tuple[Any, ...]:
    if len(buffer.shape) != axes:
        raise BackendError(f"{name} has shape {buffer.shape}, not {axes} axes")
    return buffer.shape


def _fits(buffer: Buffer, name: str, shape: tuple[int, ...]) -> None:
    if buffer.shape != shape:
        raise BackendError(f"{name} has shape {buffer.shape}, not {shape}")


def _out(backend: Backend, out: Buffer | None, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
    if out is None:
        return backend.alloc(shape, dtype)
    _fits(out, "out", shape)
    return out
