"""The saved predictions of a source: ln p of every token of the vocabulary at every position, in f16.

With them more files can be judged without the source. The file is a safetensors file: `tokens` i32 [n_seq, len], then
`log_probs.LOW` f16 [n_seq · len, rows] for each part of the vocabulary, in the order in which heads are compared. Its
metadata hold one JSON object that says whose predictions these are.

All of them are kept, since a tail that is known by its sum alone hides part of every divergence. On two small trained
models with 2048 tokens, the 1024 most likely ones with the sum of the rest give a mean KLD that is 0.06 to 0.3 % too
small, 256 of them 1.5 to 4 %; f16 of all, normalised again when it is read, is within 0.05 %. A position of M2.7 takes
400 kB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.checkpoint.safetensors_file import TensorInfo, header_length, parse_header
from ...formats.errors import CheckError, CheckpointError, InputError
from ...formats.strictjson import JsonError, compact, dump_object, parse_object
from ...formats.unchanged import UnchangedFile
from .head import ROWS, Head

KEY = "mq_quant_reference"
SCHEMA = 1
HINT = "save the source's predictions again: mq-quant evaluate FILE --source … --save-reference FILE"


def reference_bytes(positions: int, vocabulary: int) -> int:
    """What the predictions at so many positions take, but for the header."""
    return 2 * positions * vocabulary + 4 * positions


def part_name(low: int) -> str:
    return f"log_probs.{low:09d}"


def encode_reference(
    source: Head,
    totals: list[Tensor],
    tokens: NDArray[np.integer],
    vocabulary: int,
    record: Mapping[str, Any],
) -> Iterator[memoryview]:
    """The bytes of the file, in pieces. `totals` holds ln Σ exp(logit) f64 [len] of each sequence."""
    yield memoryview(_header(tokens.shape, vocabulary, record))
    yield memoryview(np.ascontiguousarray(tokens, "<i4").tobytes())
    for low in range(0, vocabulary, ROWS):
        source.load(low, min(low + ROWS, vocabulary))
        for sequence, total in enumerate(totals):
            values = source.logits(sequence, range(tokens.shape[1])) - total[:, None]
            if not torch.isfinite(values).all():
                raise CheckError("the source's logits are not numbers")
            yield values.half().numpy().astype("<f2", copy=False).reshape(-1).view(np.uint8).data


def _header(shape: tuple[int, ...], vocabulary: int, record: Mapping[str, Any]) -> bytes:
    sequences, length = shape
    header: dict[str, Any] = {"__metadata__": {KEY: compact({"schema": SCHEMA, **record}).decode()}}
    at = 0
    parts = [(part_name(low), min(ROWS, vocabulary - low)) for low in range(0, vocabulary, ROWS)]
    wanted = [("tokens", "I32", [sequences, length], 4)]
    wanted += [(name, "F16", [sequences * length, rows], 2) for name, rows in parts]
    for name, dtype, dims, size in wanted:
        stop = at + size * dims[0] * dims[1]
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [at, stop]}
        at = stop
    raw = dump_object(header)
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


@dataclass
class SavedReference:
    """An open file of predictions; `record` says whose they are, `tokens` i32 [n_seq, len] on what."""

    file: UnchangedFile
    record: Mapping[str, Any]
    parts: Mapping[str, TensorInfo]
    tokens: NDArray[np.int32]
    vocabulary: int

    def load(self, low: int, high: int) -> None:
        self._part = self.parts[part_name(low)]

    def logits(self, sequence: int, scored: range) -> Tensor:
        """ln p f64 [positions, rows] of the part that was loaded, which sum to one but for rounding."""
        rows = self._part.shape[1]
        first = sequence * self.tokens.shape[1] + scored.start
        data = self.file.read(
            lambda f: _bytes(f, self._part.start + 2 * first * rows, 2 * len(scored) * rows)
        )
        values = np.frombuffer(data, "<f2").reshape(len(scored), rows)
        return torch.from_numpy(values.astype(np.float64))


def open_reference(path: Path) -> SavedReference:
    """A file of saved predictions; InputError where it is none, or not whole."""
    file = UnchangedFile(path, InputError, HINT)

    def read(f: BufferedReader) -> tuple[bytes, list[TensorInfo]]:
        raw = f.read(header_length(f.read(8), path))
        return raw, parse_header(raw, path.name, file.size, path)

    try:
        raw, infos = file.read(read)
        stated = parse_object(raw).get("__metadata__")
        found = stated.get(KEY) if isinstance(stated, Mapping) else None
        record = parse_object(found.encode()) if isinstance(found, str) else {}
    except (CheckpointError, JsonError) as e:
        problem = e.problem if isinstance(e, CheckpointError) else str(e)
        raise InputError(f"holds no saved predictions: {problem}", file=path, hint=HINT) from None
    if record.get("schema") != SCHEMA:
        raise InputError("holds no saved predictions of this version of mq-quant", file=path, hint=HINT)
    parts = {info.name: info for info in infos}
    tokens = parts.get("tokens")
    if tokens is None or tokens.dtype != "I32" or len(tokens.shape) != 2 or not min(tokens.shape):
        raise InputError("holds no token ids", file=path, hint=HINT)
    vocabulary = _vocabulary(parts, tokens.shape[0] * tokens.shape[1])
    if vocabulary is None:
        raise InputError("its parts of the vocabulary do not follow each other", file=path, hint=HINT)
    ids = np.frombuffer(file.read(lambda f: _bytes(f, tokens.start, tokens.stop - tokens.start)), "<i4")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InputError(f"holds token ids outside its vocabulary of {vocabulary}", file=path, hint=HINT)
    return SavedReference(file, record, parts, ids.reshape(tokens.shape).astype(np.int32), vocabulary)


def _vocabulary(parts: Mapping[str, TensorInfo], positions: int) -> int | None:
    """The number of tokens of which predictions are held; None where a part is missing or has another shape."""
    low = 0
    for _ in range(len(parts) - 1):
        part = parts.get(part_name(low))
        if part is None or part.dtype != "F16" or len(part.shape) != 2 or part.shape[0] != positions:
            return None
        if not 0 < part.shape[1] <= ROWS or low % ROWS:
            return None
        low += part.shape[1]
    return low or None


def _bytes(f: BufferedReader, start: int, count: int) -> bytes:
    f.seek(start)
    data = f.read(count)
    if len(data) < count:
        raise InputError("ends before its last prediction", file=f.name, hint=HINT)
    return data
