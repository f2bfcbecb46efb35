"""Writing an imatrix as llama.cpp does, in GGUF."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import ImatrixError
from .entry import ImatrixEntry
from .gguf_file import COUNTS, SUM


def write_imatrix(
    path: str | Path,
    entries: Mapping[str, ImatrixEntry],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Write a GGUF imatrix, in_sum2 = E[x²]·count rounded to f32; ImatrixError where the file cannot be written."""
    from gguf import GGUFWriter

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        writer = GGUFWriter(partial, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets) or [""])
        writer.add_uint32("imatrix.chunk_count", chunk_count)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name, entry in entries.items():
            sums = (entry.sum2_mean.astype(np.float64) * entry.counts[:, None]).astype(np.float32)
            writer.add_tensor(name + SUM, sums)
            writer.add_tensor(name + COUNTS, entry.counts.astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except OSError as e:
        raise ImatrixError(f"cannot be written: {e.strerror}", file=path) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
