"""`mq-quant diff`: where two files differ, in metadata, formats, bytes and values.

Values are compared in the source's basis: unrotated, and w1 and w3 divided by their layer's AWQ scale, so that files
with different scales can be compared, some rows of a tensor at a time. Depends on formats, metadata and provenance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import FORMATS
from ...formats.fwht import unrotate
from ...formats.hfq.container import HfqFile, TensorEntry, open_hfq
from ...formats.minimax import awq_scale_name
from ..spec.metadata import PROVENANCE
from ..spec.provenance import flatten
from .show import format_name

_SCALED = re.compile(r"model\.layers\.(\d+)\..*\.w[13]\.weight$")
_IGNORED = re.compile(rf"{PROVENANCE}\.(reserved|checksums)")
CHUNK_WEIGHTS = 1 << 22
SHOWN = 200

F32 = NDArray[np.float32]


def diff_files(a: Path, b: Path) -> dict[str, Any]:
    """What `mq-quant diff --json` prints; raises HfqError where a file is not one."""
    with open_hfq(a) as first, open_hfq(b) as second:
        common = [(entry, second.entry(entry.name)) for entry in first.entries if entry.name in second]
        rows = [row for pair in common if (row := _compare(first, second, *pair)) is not None]
        metadata = _metadata(first, second)
        only_a = [entry.name for entry in first.entries if entry.name not in second]
        only_b = [entry.name for entry in second.entries if entry.name not in first]
        order = [e.name for e, _ in common] == [e.name for e in second.entries if e.name in first]
        return {
            "a": str(a),
            "b": str(b),
            "identical": order and not (rows or metadata or only_a or only_b),
            "same_order": order,
            "metadata": metadata,
            "only_a": only_a,
            "only_b": only_b,
            "equal_tensors": len(common) - len(rows),
            "different_tensors": rows,
        }


def _metadata(a: HfqFile, b: HfqFile) -> list[dict[str, Any]]:
    there, here = dict(flatten(a.metadata)), dict(flatten(b.metadata))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key) and not _IGNORED.match(key)]
    return [{"key": key, "a": _short(there.get(key)), "b": _short(here.get(key))} for key in keys]


def _short(value: Any) -> Any:
    text = str(value)
    return value if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def _compare(a: HfqFile, b: HfqFile, left: TensorEntry, right: TensorEntry) -> dict[str, Any] | None:
    """One tensor that differs: its formats and shapes, and the SNR of b against a; None where all is equal."""
    same_form = (left.quant_type, left.shape) == (right.quant_type, right.shape)
    if same_form and all(np.array_equal(x, y) for x, y in zip(a.chunks(left), b.chunks(right), strict=True)):
        return None
    row: dict[str, Any] = {
        "name": left.name,
        "format_a": format_name(left.quant_type),
        "format_b": format_name(right.quant_type),
    }
    if left.shape != right.shape:
        return {**row, "shape_a": list(left.shape), "shape_b": list(right.shape), "snr_db": None}
    if left.quant_type not in FORMATS or right.quant_type not in FORMATS:
        return {**row, "snr_db": None}
    signal = error = 0.0
    for x, y in zip(_plain(a, left), _plain(b, right), strict=True):
        signal += float(np.square(x, dtype=np.float64).sum())
        error += float(np.square(x.astype(np.float64) - y).sum())
    finite = math.isfinite(signal) and math.isfinite(error)
    snr = 10 * math.log10(signal / error) if finite and signal > 0 and error > 0 else None
    return {**row, "snr_db": None if snr is None else round(snr, 2)}


def _plain(file: HfqFile, entry: TensorEntry) -> Iterator[F32]:
    """A tensor's values in the source's basis, f32 [rows, K] for some rows at a time."""
    fmt = FORMATS[entry.quant_type]
    width = entry.shape[-1] if entry.shape else 1
    rows = math.prod(entry.shape) // width
    step = max(1, CHUNK_WEIGHTS // width)
    scale = _scale(file, entry.name, width)
    for low in range(0, rows, step):
        high = min(low + step, rows)
        part = file.read_range(entry, fmt.nbytes(low * width), fmt.nbytes(high * width))
        values = fmt.decode(part).reshape(high - low, width)
        yield (unrotate(values) if fmt.rotated else values) / scale


def _scale(file: HfqFile, name: str, width: int) -> F32:
    match = _SCALED.match(name)
    sidecar = awq_scale_name(int(match[1])) if match else None
    if sidecar is None or sidecar not in file or file.entry(sidecar).nbytes != 2 * width:
        return np.ones(1, np.float32)
    return file.read(sidecar).view("<f2").astype(np.float32)
