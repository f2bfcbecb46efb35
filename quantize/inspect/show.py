"""What `mq-quant inspect` shows of a file: header, metadata, tensors, one tensor's statistics, provenance.

Depends on formats and metadata; reads one payload at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...formats.blocks import FORMATS
from ...formats.errors import HfqError, HfqKind, RecipeError
from ...formats.hfq import HfqFile, TensorEntry, open_hfq
from ...formats.hfq.provenance import Provenance, stated_quantization_hash

_CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_local_experts",
    "num_experts_per_tok",
    "intermediate_size",
    "vocab_size",
)


def format_name(quant_type: int) -> str:
    return FORMATS[quant_type].name if quant_type in FORMATS else f"type {quant_type}"


def inspect_file(
    path: Path, pattern: str | None = None, tensor: str | None = None, groups: int = 2
) -> dict[str, Any]:
    """Header, metadata summary, the tensors whose name holds `pattern`, and `tensor` decoded.

    Raises HfqError for a file that is not one, RecipeError for a pattern that is no regular expression.
    """
    with open_hfq(path) as file:
        return {
            "path": str(path),
            "header": {
                "version": file.version,
                "arch_id": file.arch_id,
                "tensor_count": len(file.entries),
                "data_offset": file.data_offset,
                "total_bytes": path.stat().st_size,
                "trailing_bytes": file.trailing_bytes,
            },
            "metadata": summarise(file.metadata, len(file.metadata_bytes)),
            "by_format": by_format(file),
            "tensors": [row(entry) for entry in matching(file, pattern)],
            "tensor": decoded(file, tensor, groups) if tensor else None,
        }


def matching(file: HfqFile, pattern: str | None) -> list[TensorEntry]:
    """The tensors whose name holds a regular expression; all without one."""
    try:
        search = re.compile(pattern or "").search
    except re.error as e:
        raise RecipeError(f"{pattern!r} is not a regular expression: {e}") from None
    return [entry for entry in file.entries if search(entry.name)]


def row(entry: TensorEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "format": format_name(entry.quant_type),
        "shape": list(entry.shape),
        "offset": entry.offset,
        "bytes": entry.nbytes,
    }


def by_format(file: HfqFile) -> dict[str, dict[str, int]]:
    """{format name: {tensors, weights, bytes}} over the whole index."""
    out: dict[str, dict[str, int]] = {}
    for entry in file.entries:
        sums = out.setdefault(format_name(entry.quant_type), {"tensors": 0, "weights": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["weights"] += math.prod(entry.shape)
        sums["bytes"] += entry.nbytes
    return out


def summarise(metadata: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What a person wants to know of the metadata; a file by another program may lack any of it."""
    recipe = Provenance.read(metadata).recipe
    config, tokenizer = (
        value if isinstance(value := metadata.get(key), dict) else {}
        for key in ("config", "tokenizer_config")
    )
    return {
        "bytes": size,
        "architecture": metadata.get("architecture"),
        "config": {key: config.get(key) for key in _CONFIG_KEYS},
        "tokenizer": isinstance(metadata.get("tokenizer"), str),
        "chat_template": "chat_template" in tokenizer,
        "quantization_hash": stated_quantization_hash(metadata),
        "tier": recipe.tier if recipe else None,
        "fit": recipe.fit if recipe else None,
        "keys": sorted(metadata),
    }


def decoded(file: HfqFile, name: str, groups: int) -> dict[str, Any]:
    """Statistics of one tensor in its stored basis, and its first groups decoded; HfqError for unknown formats."""
    entry = file.entry(name)
    fmt = FORMATS.get(entry.quant_type)
    if fmt is None:
        raise HfqError(
            f"is of the unknown quant_type {entry.quant_type}",
            kind=HfqKind.UNKNOWN_FORMAT,
            file=file.path,
            tensor=name,
        )
    count, total, square, low, high, finite = 0, 0.0, 0.0, math.inf, -math.inf, True
    step = fmt.group_bytes * max(1, (8 << 20) // fmt.group_bytes)
    for start in range(0, entry.nbytes, step):
        part = file.read_range(entry, start, min(start + step, entry.nbytes))
        with np.errstate(invalid="ignore"):
            values = fmt.decode(part).astype(np.float64)
        count, total, square = count + values.size, total + values.sum(), square + np.square(values).sum()
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        finite = finite and bool(np.isfinite(values).all())
    shown = max(1, 8 if fmt.group == 1 else groups)
    first = fmt.decode(file.read_range(entry, 0, min(entry.nbytes, shown * fmt.group_bytes)))
    return {
        **row(entry),
        "basis": "rotated" if fmt.rotated else "plain",
        "statistics": {
            "weights": count,
            "mean": _number(total / count),
            "rms": _number(math.sqrt(square / count) if square >= 0 else square),
            "min": _number(low),
            "max": _number(high),
            "finite": finite,
        },
        "first_groups": [[_number(float(v)) for v in group] for group in first],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def provenance(path: Path) -> Provenance:
    """The provenance that mq-quant wrote into a file; HfqError where another program made it."""
    with open_hfq(path) as file:
        record = Provenance.of(file)
    if not record.document:
        raise HfqError(
            "holds no provenance",
            kind=HfqKind.PROVENANCE,
            file=path,
            hint="mq-quant did not make it, or its metadata was edited",
        )
    return record
