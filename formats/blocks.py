"""The block formats of HFQ files: one class per format with pack, unpack and decode, and one size table.

All arrays are little endian. `decode` returns values in the stored basis: for the MQ formats that is the rotated one.
Plain numpy, to be read as the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import HfqError, HfqKind, WeightError

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """What every block format has: its number, its name, and the size of one group of `group` weights.

    `group_size` is the value of that field in the HFQ index; `levels` the number of codes (0 for plain floats).
    """

    name: str
    quant_type: int
    group: int
    group_bytes: int
    group_size: int
    levels: int
    rotated: bool

    def nbytes(self, weights: int) -> int:
        """Bytes that `weights` weights take; HfqError where they do not fill whole groups."""
        groups, rest = divmod(weights, self.group)
        if rest:
            raise HfqError(
                f"{weights} weights do not fill groups of {self.group} in format {self.name}",
                kind=HfqKind.GROUPS,
            )
        return groups * self.group_bytes

    def groups(self, payload: U8 | bytes | memoryview) -> U8:
        """View a payload as u8 [groups, group_bytes]; HfqError where its length does not fit."""
        flat = (
            np.frombuffer(payload, np.uint8) if not isinstance(payload, np.ndarray) else payload.reshape(-1)
        )
        if flat.size % self.group_bytes:
            raise HfqError(
                f"{flat.size} bytes are not whole groups of {self.group_bytes} in format {self.name}",
                kind=HfqKind.LENGTH,
            )
        return flat.reshape(-1, self.group_bytes)

    def decode(self, payload: U8 | bytes | memoryview) -> F32:
        """Decode a payload to f32 [groups, group] in the stored basis.

        Payloads of strangers may hold levels that are not finite; what they give is not finite either, and no warning.
        """
        raise NotImplementedError


class FloatFormat(Format):
    """Plain F16 or F32 values, one per group."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<f2" if self.group_bytes == 2 else "<f4")

    def pack(self, values: F32) -> U8:
        """f32 [...] to the stored type (nearest even), as u8 [weights, bytes]; WeightError where that overflows."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values).astype(self.dtype)
        if np.isinf(stored).sum() != np.isinf(values).sum():
            raise WeightError(f"values beyond the range of {self.name}")
        return stored.reshape(-1, 1).view(np.uint8)

    def unpack(self, payload: U8 | bytes | memoryview) -> NDArray[Any]:
        """The stored values as f16 or f32 [weights]."""
        return np.ascontiguousarray(self.groups(payload)).view(self.dtype).reshape(-1)

    def decode(self, payload: U8 | bytes | memoryview) -> F32:
        return self.unpack(payload).astype(np.float32).reshape(-1, 1)


class Q8Format(Format):
    """f16 scale and 32 signed bytes: w = scale · q."""

    def pack(self, scale: F16, codes: NDArray[np.int8]) -> U8:
        """scale f16 [G], codes i8 [G, 32] to u8 [G, 34]."""
        return _join(scale.astype("<f2").reshape(-1, 1), codes.astype(np.int8))

    def unpack(self, payload: U8 | bytes | memoryview) -> tuple[F16, NDArray[np.int8]]:
        """(scale f16 [G], codes i8 [G, 32])."""
        groups = self.groups(payload)
        return _field(groups, 0, "<f2", 1)[:, 0], groups[:, 2:].view(np.int8)

    @np.errstate(invalid="ignore")
    def decode(self, payload: U8 | bytes | memoryview) -> F32:
        scale, codes = self.unpack(payload)
        return scale.astype(np.float32)[:, None] * codes.astype(np.float32)


class AffineFormat(Format):
    """f32 scale, f32 zero and unsigned codes: w = zero + scale · q, the product rounded to f32 before the sum."""

    @property
    def bits(self) -> int:
        return self.levels.bit_length() - 1

    def pack(self, scale: F32, zero: F32, codes: U8) -> U8:
        """scale f32 [G], zero f32 [G], codes u8 [G, 256] to u8 [G, group_bytes]."""
        head = np.stack([scale, zero], axis=1).astype("<f4")
        return _join(head, pack_bits(codes, self.bits))

    def unpack(self, payload: U8 | bytes | memoryview) -> tuple[F32, F32, U8]:
        """(scale f32 [G], zero f32 [G], codes u8 [G, 256])."""
        groups = self.groups(payload)
        head = _field(groups, 0, "<f4", 2)
        return head[:, 0], head[:, 1], unpack_bits(groups[:, 8:], self.bits)

    @np.errstate(over="ignore", invalid="ignore")
    def decode(self, payload: U8 | bytes | memoryview) -> F32:
        scale, zero, codes = self.unpack(payload)
        values = codes.astype(np.float32)
        values *= scale[:, None]
        values += zero[:, None]
        return values


class LloydFormat(Format):
    """An ascending f16 codebook per group and unsigned codes: w = codebook[code]."""

    @property
    def bits(self) -> int:
        return self.levels.bit_length() - 1

    def pack(self, codebook: F16, codes: U8) -> U8:
        """codebook f16 [G, levels], codes u8 [G, 256] to u8 [G, group_bytes]."""
        return _join(codebook.astype("<f2"), pack_bits(codes, self.bits))

    def unpack(self, payload: U8 | bytes | memoryview) -> tuple[F16, U8]:
        """(codebook f16 [G, levels], codes u8 [G, 256])."""
        groups = self.groups(payload)
        return _field(groups, 0, "<f2", self.levels), unpack_bits(groups[:, 2 * self.levels :], self.bits)

    def decode(self, payload: U8 | bytes | memoryview) -> F32:
        codebook, codes = self.unpack(payload)
        first = np.arange(0, codebook.size, self.levels)[:, None]
        return np.take(codebook.astype(np.float32), first + codes)


def _field(groups: U8, start: int, dtype: str, count: int) -> NDArray[Any]:
    width = np.dtype(dtype).itemsize * count
    return np.ascontiguousarray(groups[:, start : start + width]).view(dtype)


def _join(head: NDArray[Any], body: NDArray[Any]) -> U8:
    return np.concatenate([np.ascontiguousarray(head).view(np.uint8), body.view(np.uint8)], axis=1)


def _pack_2(codes: U8) -> U8:
    q = codes.reshape(len(codes), codes.shape[1] // 4, 4)
    return np.asarray(q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6, np.uint8)


def _pack_4(codes: U8) -> U8:
    q = codes.reshape(len(codes), codes.shape[1] // 2, 2)
    return np.asarray(q[:, :, 0] | q[:, :, 1] << 4, np.uint8)


def _pack_3(codes: U8) -> U8:
    q = codes.reshape(len(codes), codes.shape[1] // 8, 8)
    low = q[:, :, 0] | q[:, :, 1] << 3 | q[:, :, 2] << 6
    mid = q[:, :, 2] >> 2 | q[:, :, 3] << 1 | q[:, :, 4] << 4 | q[:, :, 5] << 7
    high = q[:, :, 5] >> 1 | q[:, :, 6] << 2 | q[:, :, 7] << 5
    return np.asarray(np.stack([low, mid, high], axis=2).reshape(len(codes), 3 * low.shape[1]), np.uint8)


def _pack_6(codes: U8) -> U8:
    q = codes.reshape(len(codes), codes.shape[1] // 4, 4)
    low = q[:, :, 0] | q[:, :, 1] << 6
    mid = q[:, :, 1] >> 2 | q[:, :, 2] << 4
    high = q[:, :, 2] >> 4 | q[:, :, 3] << 2
    return np.asarray(np.stack([low, mid, high], axis=2).reshape(len(codes), 3 * low.shape[1]), np.uint8)


_PACK: dict[int, Callable[[U8], U8]] = {2: _pack_2, 3: _pack_3, 4: _pack_4, 6: _pack_6}


def pack_bits(codes: U8, bits: int) -> U8:
    """Pack u8 codes [G, n] of `bits` bits each into a least-significant-bit-first stream, u8 [G, n·bits/8]."""
    return _PACK[bits](codes)


def unpack_bits(stream: U8, bits: int) -> U8:
    """Undo pack_bits: u8 [G, n·bits/8] to u8 [G, n]."""
    word: Any = np.uint32 if bits <= 4 else np.uint64
    eight = np.zeros((len(stream), stream.shape[1] // bits), word)  # the bits of eight codes
    for n in range(bits):
        eight |= stream[:, n::bits].astype(word) << word(8 * n)
    codes = np.empty((*eight.shape, 8), np.uint8)
    for n in range(8):
        codes[:, :, n] = eight >> word(n * bits) & word(2**bits - 1)
    return codes.reshape(len(stream), 8 * eight.shape[1])


F16_FORMAT = FloatFormat("F16", 1, 1, 2, 0, 0, False)
F32_FORMAT = FloatFormat("F32", 2, 1, 4, 0, 0, False)
Q8F16 = Q8Format("Q8F16", 3, 32, 34, 32, 256, False)
MQ4 = AffineFormat("MQ4", 13, 256, 136, 256, 16, True)
MQ6 = AffineFormat("MQ6", 15, 256, 200, 256, 64, True)
MQ2_LLOYD = LloydFormat("MQ2-Lloyd", 19, 256, 72, 256, 4, True)
MQ3_LLOYD = LloydFormat("MQ3-Lloyd", 20, 256, 112, 256, 8, True)
MQ4_LLOYD = LloydFormat("MQ4-Lloyd", 30, 256, 160, 256, 16, True)

FORMATS: dict[int, Format] = {
    f.quant_type: f for f in (F16_FORMAT, F32_FORMAT, Q8F16, MQ4, MQ6, MQ2_LLOYD, MQ3_LLOYD, MQ4_LLOYD)
}
BY_NAME: dict[str, Format] = {f.name: f for f in FORMATS.values()}
EXPERT_FORMATS = frozenset({MQ4.quant_type, MQ6.quant_type, MQ2_LLOYD.quant_type, MQ3_LLOYD.quant_type})
"""Formats of expert matrices that the engine's mixture-of-experts kernels run."""
