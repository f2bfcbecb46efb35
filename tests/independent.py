"""A second reading of the formats, in plain numpy and straight from their description: it shares no code with mq_quant.

`hfq(path)` and `safetensors(folder)` read containers; `decode` turns a payload into weights in the source's basis.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

Tensor = tuple[int, tuple[int, ...], bytes]
GROUP = 256


def hfq(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The metadata, and {name: (quant_type, shape, payload)}."""
    raw = path.read_bytes()
    magic, version, arch, count, metadata_at, data_at = struct.unpack_from("<4sIIIQQ", raw)
    assert (magic, version, arch, metadata_at) == (b"HFQM", 1, 10, 32)
    metadata, at = json.JSONDecoder().raw_decode(raw[32:data_at].decode("utf-8", errors="replace"))
    at = 32 + len(raw[32:data_at].decode("utf-8", errors="replace")[:at].encode())
    assert struct.unpack_from("<I", raw, at) == (count,)
    at += 4
    tensors, start = {}, data_at
    for _ in range(count):
        (length,) = struct.unpack_from("<H", raw, at)
        name = raw[at + 2 : at + 2 + length].decode()
        at += 2 + length
        quant_type, dims = struct.unpack_from("<BB", raw, at)
        shape = struct.unpack_from(f"<{dims}I", raw, at + 2)
        at += 2 + 4 * dims
        _, nbytes = struct.unpack_from("<IQ", raw, at)
        at += 12
        tensors[name] = (quant_type, shape, raw[start : start + nbytes])
        start += nbytes
    assert start == len(raw)
    assert data_at == -(-at // 4096) * 4096
    return metadata, tensors


def signs(seed: int) -> np.ndarray:
    state, out = seed, []
    for _ in range(GROUP):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(1.0 if state >> 16 & 1 else -1.0)
    return np.array(out)


def rotation() -> np.ndarray:
    """R with y = R·x for one group: S2 · H · S1 / 16."""
    h = np.ones((1, 1))
    while len(h) < GROUP:
        h = np.block([[h, h], [h, -h]])
    return signs(1042)[:, None] * h * signs(42)[None, :] / 16


R = rotation()


def bits(stream: np.ndarray, width: int) -> np.ndarray:
    """Codes of `width` bits from least-significant-bit-first streams u8 [G, n]."""
    value = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(stream), -1, width)
    return sum(value[:, :, i].astype(np.int64) << i for i in range(width))


def decode(tensor: Tensor) -> np.ndarray:
    """The weights of one tensor, f64, unrotated; an AWQ scale is still in them."""
    quant_type, shape, payload = tensor
    if quant_type in (1, 2):
        return np.frombuffer(payload, "<f2" if quant_type == 1 else "<f4").reshape(shape).astype(np.float64)
    size = {3: 34, 13: 136, 15: 200, 19: 72, 20: 112, 30: 160}[quant_type]
    groups = np.frombuffer(payload, np.uint8).reshape(-1, size)
    if quant_type == 3:
        scale = groups[:, :2].copy().view("<f2").astype(np.float64)
        return (scale * groups[:, 2:].view(np.int8)).reshape(shape)
    if quant_type in (13, 15):
        head = groups[:, :8].copy().view("<f4").astype(np.float64)
        values = head[:, 1:] + head[:, :1] * bits(groups[:, 8:], 4 if quant_type == 13 else 6)
    else:
        width = {19: 2, 20: 3, 30: 4}[quant_type]
        levels = groups[:, : 2 << width].copy().view("<f2").astype(np.float64)
        assert (np.diff(levels) >= 0).all()
        values = np.take_along_axis(levels, bits(groups[:, 2 << width :], width), axis=1)
    return (values @ R).reshape(shape)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """FP8 E4M3 (no infinities) to f64."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    assert not ((codes & 0x7F) == 0x7F).any()
    normal = (1 + mantissa / 8) * np.exp2(exponent.astype(float) - 7)
    return sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def safetensors(folder: Path) -> dict[str, np.ndarray]:
    """Every weight of a checkpoint as f64, FP8 multiplied by its block scales."""
    raw: dict[str, np.ndarray] = {}
    codes: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        data = shard.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, info in header.items():
            low, high = info["data_offsets"]
            part = np.frombuffer(data[8 + length + low : 8 + length + high], np.uint8)
            if info["dtype"] == "F8_E4M3":
                codes[name] = part.reshape(info["shape"])
            elif info["dtype"] == "BF16":
                wide = part.view("<u2").astype(np.uint32) << 16
                raw[name] = wide.view(np.float32).reshape(info["shape"]).astype(np.float64)
            else:
                raw[name] = part.view("<f4").reshape(info["shape"]).astype(np.float64)
    for name, part in codes.items():
        scale = raw.pop(f"{name}_scale_inv").repeat(128, 0).repeat(128, 1)
        raw[name] = e4m3(part.astype(np.int64)) * scale[: part.shape[0], : part.shape[1]]
    return raw


def snr(true: np.ndarray, approximate: np.ndarray) -> float:
    """Signal to noise in dB."""
    noise = float(np.square(true - approximate).sum())
    return float(10 * np.log10(np.square(true).sum() / noise)) if noise else float("inf")
