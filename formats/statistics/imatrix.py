"""Importance matrices of the llama.cpp family: GGUF and the legacy .dat, told apart by content, never by suffix.

What counts is E[x²] per input channel. Values are handed on as the file has them, inf and NaN included: what to do
about those is policy. Entries are read when asked for, so that a file of half a gigabyte stays on disk.
Depends on numpy and gguf (imported when needed), and on ggufcheck, minimax and errors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ImatrixError
from ..minimax import PROJECTIONS, ModelConfig
from .gguf_header import MAGIC, check_gguf_header

ENTRY_LIMIT = 1 << 16
NAME_LIMIT = 1 << 12
GGUF_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
SHOWN = 8

_SUM, _COUNTS = ".in_sum2", ".counts"
_OTHER_MODEL = "the imatrix is of another model; pass the one made from this checkpoint"


@dataclass(frozen=True)
class ImatrixEntry:
    """One weight's statistics: `sum2_mean` f32 [n_mat, K] = E[x²] per channel, 0 where nothing was counted.

    `counts` f64 [n_mat] are the tokens behind each row. Where `counted` is False the file has none per matrix (.dat):
    then they are the file's number of calls, and 0 for rows whose values are all the same, as unused experts have.
    """

    sum2_mean: NDArray[np.float32]
    counts: NDArray[np.float64]
    counted: bool = True


@dataclass(frozen=True)
class Imatrix:
    """One imatrix file; `entries` maps llama.cpp weight names such as `blk.0.ffn_up_exps.weight`, read on access."""

    path: Path
    kind: Literal["gguf", "dat"]
    datasets: tuple[str, ...]
    chunk_count: int
    sha256: str
    entries: Mapping[str, ImatrixEntry]


class _Lazy(Mapping[str, ImatrixEntry]):
    """Entries computed from the mapped file each time they are asked for."""

    def __init__(self, loaders: Mapping[str, Callable[[], ImatrixEntry]]) -> None:
        self._loaders = loaders

    def __getitem__(self, name: str) -> ImatrixEntry:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def read_imatrix(path: str | Path) -> Imatrix:
    """Open an imatrix file of either kind; raises ImatrixError for anything else and for broken ones."""
    path = Path(path)
    try:
        with path.open("rb") as f:
            return _read_gguf(path) if f.read(4) == MAGIC else _read_dat(path)
    except OSError as e:
        raise ImatrixError(f"cannot be read: {e.strerror}", file=path, hint="check --imatrix") from None


def _read_gguf(path: Path) -> Imatrix:
    from gguf import GGUFReader

    try:
        check_gguf_header(path)
        with np.errstate(all="ignore"):
            reader = GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except OSError:
        raise
    except Exception as e:  # the package has no errors of its own: a broken file surfaces as any of numpy's
        raise ImatrixError(f"is a broken GGUF file: {e}", file=path, hint="fetch it again") from None
    if keys.get("general.type") != "imatrix":
        raise ImatrixError(f"is a GGUF file of type {keys.get('general.type')!r}, not an imatrix", file=path)
    loaders = {n.removesuffix(_SUM): _gguf_loader(path, n, tensors) for n in tensors if n.endswith(_SUM)}
    if not loaders:
        raise ImatrixError("holds no in_sum2 tensors", file=path)
    datasets, chunks = keys.get("imatrix.datasets", []), keys.get("imatrix.chunk_count", 0)
    names = tuple(str(d) for d in datasets) if isinstance(datasets, list) else (str(datasets),)
    chunk_count = chunks if isinstance(chunks, int) else 0
    return Imatrix(path, "gguf", names, chunk_count, _sha256(path), _Lazy(loaders))


def _gguf_loader(path: Path, name: str, tensors: Mapping[str, Any]) -> Callable[[], ImatrixEntry]:
    weight = name.removesuffix(_SUM)
    sums, counts = tensors[name], tensors.get(weight + _COUNTS)
    if counts is None:
        raise ImatrixError("has in_sum2 but no counts", file=path, tensor=weight)
    for t in (sums, counts):
        if t.tensor_type.name != "F32" or t.data.dtype != np.float32 or t.data.size == 0:
            raise ImatrixError(f"{t.name} is not a filled F32 tensor", file=path, tensor=weight)
    rows = sums.data.reshape(-1, sums.data.shape[-1])
    if counts.data.size != len(rows):
        raise ImatrixError(f"{counts.data.size} counts for {len(rows)} matrices", file=path, tensor=weight)
    return lambda: _mean(rows, counts.data.reshape(-1).astype(np.float64))


def _mean(sums: NDArray[np.float32], counts: NDArray[np.float64], counted: bool = True) -> ImatrixEntry:
    """Sums f32 [n, K] over counts f64 [n], divided in f64 and rounded to f32; unusable counts become 0."""
    counts = np.where(np.isfinite(counts) & (counts > 0), counts, 0.0)
    with np.errstate(all="ignore"):
        mean = (sums.astype(np.float64) / np.where(counts > 0, counts, 1.0)[:, None]).astype(np.float32)
    mean[counts == 0] = 0
    return ImatrixEntry(mean, counts, counted)


def _read_dat(path: Path) -> Imatrix:
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    loaders: dict[str, Callable[[], ImatrixEntry]] = {}
    with path.open("rb") as f:
        for _ in range(_number(f, path, 1, ENTRY_LIMIT, "entries")):
            name = _text(f, path)
            calls = _number(f, path, 0, (1 << 31) - 1, f"calls of {name}")
            values = _number(f, path, 1, (data.size - f.tell()) // 4, f"values of {name}")
            if name in loaders:
                raise ImatrixError("appears twice", file=path, tensor=name)
            loaders[name] = _dat_loader(data[f.tell() : f.tell() + 4 * values], calls)
            f.seek(4 * values, os.SEEK_CUR)
        datasets: tuple[str, ...] = ()
        chunk_count = 0
        if f.tell() < data.size:
            chunk_count = _number(f, path, 0, (1 << 31) - 1, "chunks")
            if f.tell() < data.size:
                datasets = (_text(f, path),)
        if f.tell() != data.size:
            raise ImatrixError(f"{data.size - f.tell()} bytes follow the last entry", file=path)
    return Imatrix(path, "dat", datasets, chunk_count, _sha256(path), _Lazy(loaders))


def _dat_loader(stored: NDArray[np.uint8], calls: int) -> Callable[[], ImatrixEntry]:
    return lambda: _mean(np.frombuffer(stored.tobytes(), "<f4")[None], np.array([calls], np.float64), False)


def _number(f: BinaryIO, path: Path, low: int, high: int, what: str) -> int:
    raw = f.read(4)
    value = struct.unpack("<i", raw)[0] if len(raw) == 4 else None
    if value is None or not low <= value <= high:
        found = "the end of the file" if value is None else value
        raise ImatrixError(
            f"is no imatrix, or a broken one: {found} where the number of {what} should be",
            file=path,
            hint="an imatrix is a GGUF file of type imatrix or llama.cpp's legacy .dat",
        )
    return int(value)


def _text(f: BinaryIO, path: Path) -> str:
    length = _number(f, path, 0, NAME_LIMIT, "bytes in a name")
    raw = f.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if len(raw) != length or not text.isprintable():
        raise ImatrixError(f"is no imatrix, or a broken one: {raw[:32]!r} is no name", file=path)
    return text


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_imatrix(
    path: str | Path,
    entries: Mapping[str, ImatrixEntry],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Write a GGUF imatrix as llama.cpp does, in_sum2 = E[x²]·count rounded to f32; ImatrixError where that fails."""
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
            writer.add_tensor(name + _SUM, sums)
            writer.add_tensor(name + _COUNTS, entry.counts.astype(np.float32)[:, None])
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


def expert_entry(
    imatrix: Imatrix, layer: int, projection: str, n_experts: int | None = None
) -> ImatrixEntry | None:
    """The statistics of one layer's experts for "w1", "w2" or "w3", row e for expert e; None if the file has none.

    A .dat does not say how many experts it holds: `n_experts` splits its values, where they can be split.
    """
    entry = imatrix.entries.get(f"blk.{layer}.{GGUF_NAMES[projection]}.weight")
    if entry is None or entry.counted or n_experts is None or entry.sum2_mean.size % n_experts:
        return entry
    rows = entry.sum2_mean.reshape(n_experts, -1)
    unused = (rows == rows[:, :1]).all(axis=1)
    counts = np.where(unused, 0.0, entry.counts[0])
    return ImatrixEntry(np.where(unused[:, None], np.float32(0), rows), counts, False)


def check_imatrix(imatrix: Imatrix, config: ModelConfig) -> None:
    """Raise ImatrixError unless every layer and projection has statistics of the model's shape, and some of use."""
    problems = list(islice(_problems(imatrix, config), SHOWN + 1))
    if problems:
        more = "; and more" if len(problems) > SHOWN else ""
        raise ImatrixError("; ".join(problems[:SHOWN]) + more, file=imatrix.path, hint=_OTHER_MODEL)


def _problems(imatrix: Imatrix, config: ModelConfig) -> Iterator[str]:
    width = {"w1": config.hidden_size, "w2": config.intermediate_size, "w3": config.hidden_size}
    for layer in range(config.num_hidden_layers):
        for projection in PROJECTIONS:
            where = f"blk.{layer}.{GGUF_NAMES[projection]}.weight"
            entry = expert_entry(imatrix, layer, projection, config.num_local_experts)
            expected = (config.num_local_experts, width[projection])
            if entry is None:
                yield f"{where} is missing"
            elif entry.sum2_mean.shape != expected:
                yield f"{where} has {_shape(entry.sum2_mean.shape)}, the model {_shape(expected)}"
            elif not _healthy(entry).any():
                yield f"{where} has data for none of its experts"


def coverage(imatrix: Imatrix, config: ModelConfig) -> float:
    """Share of experts with usable data, over all layers and projections of an imatrix that fits the model."""
    found = [
        _healthy(entry).mean()
        for layer in range(config.num_hidden_layers)
        for projection in PROJECTIONS
        if (entry := expert_entry(imatrix, layer, projection, config.num_local_experts)) is not None
    ]
    return float(np.sum(found) / (config.num_hidden_layers * len(PROJECTIONS)))


def _healthy(entry: ImatrixEntry) -> NDArray[np.bool_]:
    """bool [n_mat]: counted, and at least one channel with a finite positive value."""
    usable = np.isfinite(entry.sum2_mean) & (entry.sum2_mean > 0)
    healthy: NDArray[np.bool_] = (entry.counts > 0) & usable.any(axis=1)
    return healthy


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} matrices of {shape[1]} channels"
