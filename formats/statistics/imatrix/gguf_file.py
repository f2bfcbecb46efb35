"""Imatrices in GGUF: per weight a tensor of sums `NAME.in_sum2` and one of `NAME.counts`."""

from __future__ import annotations

from io import BufferedReader

import numpy as np

from ...errors import ImatrixError
from ...text import shown
from ...unchanged import UnchangedFile
from .entry import Entries, Imatrix, ImatrixEntry, Loader, add_entry, mean_entry
from .gguf_header import F32, TYPE, GgufHeader, GgufTensor, read_gguf_header

KIND = "imatrix"
SUM, COUNTS = ".in_sum2", ".counts"


def read_gguf(file: UnchangedFile) -> Imatrix:
    """The imatrix in a GGUF file; ImatrixError where the file is broken or is no imatrix."""
    try:
        header = file.read(lambda f: read_gguf_header(f, file.size, KIND))
    except ValueError as e:
        raise ImatrixError(f"is a broken GGUF file: {e}", file=file.path, hint="fetch it again") from None
    kind = header.keys.get(TYPE)
    if kind != KIND:
        raise ImatrixError(f"is a GGUF file of type {shown(kind)}, not an imatrix", file=file.path)
    loaders: dict[str, Loader] = {}
    for name in header.tensors:
        if name.endswith(SUM):
            weight = name.removesuffix(SUM)
            add_entry(loaders, weight, _loader(file, weight, header), file.path)
    if not loaders:
        raise ImatrixError("holds no in_sum2 tensors", file=file.path)
    datasets, chunks = header.keys.get("imatrix.datasets", []), header.keys.get("imatrix.chunk_count", 0)
    names = tuple(str(d) for d in datasets) if isinstance(datasets, list) else (str(datasets),)
    chunk_count = chunks if isinstance(chunks, int) else 0
    return Imatrix(file.path, "gguf", names, chunk_count, file.sha256(), Entries(loaders))


def _loader(file: UnchangedFile, weight: str, header: GgufHeader) -> Loader:
    """How to read one entry, its shapes checked now."""
    sums, counts = header.tensors[weight + SUM], header.tensors.get(weight + COUNTS)
    if counts is None:
        raise ImatrixError("has in_sum2 but no counts", file=file.path, tensor=weight)
    for suffix, tensor in ((SUM, sums), (COUNTS, counts)):
        if tensor.kind != F32 or not tensor.items:
            raise ImatrixError(f"{weight}{suffix} is not a filled F32 tensor", file=file.path, tensor=weight)
        if tensor.start + 4 * tensor.items > file.size:
            raise ImatrixError(
                f"is a broken GGUF file: {weight}{suffix} reaches beyond its end",
                file=file.path,
                hint="fetch it again",
            )
    channels = sums.dims[0] if sums.dims else 1
    matrices = sums.items // channels
    if counts.items != matrices:
        raise ImatrixError(f"{counts.items} counts for {matrices} matrices", file=file.path, tensor=weight)

    def load() -> ImatrixEntry:
        stored = [
            np.frombuffer(part, "<f4") for part in file.read(lambda f: [_data(f, sums), _data(f, counts)])
        ]
        return mean_entry(stored[0].reshape(matrices, channels), stored[1].astype(np.float64))

    return load


def _data(f: BufferedReader, tensor: GgufTensor) -> bytes:
    f.seek(tensor.start)
    return f.read(4 * tensor.items)
