"""HFQ files written by the plainest encoders there are: helpers for tests that need a file, not a good one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from mq_quant.formats.blocks import BY_NAME, AffineFormat, FloatFormat, Format, LloydFormat, Q8Format
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.fwht import rotate
from mq_quant.formats.hfq import QuantizationHash, TensorMeta
from mq_quant.formats.hfq.layout import metadata_checksum
from mq_quant.formats.minimax import awq_scale_name, inventory, normalize_config

Tensors = list[tuple[TensorMeta, np.ndarray]]
Change = Callable[[dict[str, Any], Tensors], None]
Build = Callable[..., Path]


def encode(w: np.ndarray, fmt: Format) -> np.ndarray:
    """A payload u8 of f32 weights: the range cut into equal steps, or quantiles as centroids."""
    if isinstance(fmt, FloatFormat):
        return fmt.pack(w).reshape(-1)
    groups = (rotate(w) if fmt.rotated else w).reshape(-1, fmt.group)
    if isinstance(fmt, Q8Format):
        scale = (np.abs(groups).max(1) / 127).astype(np.float16)
        safe = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
        return fmt.pack(scale, np.clip(np.rint(groups / safe), -127, 127).astype(np.int8)).reshape(-1)
    if isinstance(fmt, AffineFormat):
        low = groups.min(1)
        step = ((groups.max(1) - low) / (fmt.levels - 1)).astype(np.float32)
        codes = np.rint((groups - low[:, None]) / step[:, None]).clip(0, fmt.levels - 1)
        return fmt.pack(step, low, codes.astype(np.uint8)).reshape(-1)
    assert isinstance(fmt, LloydFormat)
    share = (2 * np.arange(fmt.levels) + 1) / (2 * fmt.levels)
    book = np.quantile(groups, share, axis=1).T.astype(np.float16)
    book = (book * np.float16(1.2 + 0.04 * fmt.levels)).astype(np.float16)  # about the best spread for a bell
    codes = np.abs(groups[:, :, None] - book[:, None, :].astype(np.float32)).argmin(2)
    return fmt.pack(book, codes.astype(np.uint8)).reshape(-1)


def format_of(role: str, projection: str | None, gate_up: str, down: str) -> Format:
    plain = {"norm": "F32", "bias": "F32"}.get(role, "Q8F16")
    return BY_NAME[plain if role != "expert" else down if projection == "w2" else gate_up]


def tensors_of(source: Checkpoint, gate_up: str, down: str, exact: bool = False) -> Tensors:
    """Every tensor of a file, with a sidecar per layer; `exact` keeps everything but the embeddings in F32."""
    scale = np.exp(0.3 * np.random.default_rng(3).standard_normal(source.config.hidden_size)).astype(
        np.float16
    )
    out: Tensors = []
    for spec in inventory(source.config):
        w = source.weight(spec.name)
        fmt = BY_NAME["F32"] if exact else format_of(spec.role, spec.projection, gate_up, down)
        if spec.projection in ("w1", "w3"):
            w = w * scale.astype(np.float32)
        if spec.role == "router" and spec.layer is not None:
            name, f16 = awq_scale_name(spec.layer), BY_NAME["F16"]
            out.append((TensorMeta(name, 1, scale.shape, 0, scale.nbytes), f16.pack(scale).reshape(-1)))
        payload = encode(w, fmt)
        out.append(
            (TensorMeta(spec.name, fmt.quant_type, spec.shape, fmt.group_size, payload.nbytes), payload)
        )
    return out


def metadata_of(source: Checkpoint, tensors: Tensors, sign: bool = True) -> dict[str, Any]:
    """The metadata of such a file; without `sign` the recorded hashes are another file's."""
    digest, checksums = QuantizationHash(), ""
    for meta, payload in tensors:
        digest.update(meta, [payload])
        checksums += xxhash.xxh64(payload.tobytes()).hexdigest()
    metadata: dict[str, Any] = {
        "architecture": "minimax_m2",
        "config": normalize_config(source.raw_config),
        "tokenizer": (source.path / "tokenizer.json").read_text("utf-8"),
        "tokenizer_config": {
            **json.loads((source.path / "tokenizer_config.json").read_text()),
            "chat_template": (source.path / "chat_template.jinja").read_text(),
        },
        "generation_config": json.loads((source.path / "generation_config.json").read_text()),
        "quantization_hash": digest.record("tests"),
        "parameter_counts": {"total_params": sum(math.prod(s.shape) for s in inventory(source.config))},
        "mq_quant": {"checksums": {"algorithm": "xxh64", "values": checksums}},
    }
    metadata["mq_quant"]["metadata_checksum"] = metadata_checksum(metadata)
    return metadata


def by_name(tensors: Tensors) -> Mapping[str, np.ndarray]:
    return {meta.name: payload for meta, payload in tensors}
