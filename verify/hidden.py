"""HFHS hidden-state dumps: the residual stream after each layer, to be compared with the engine's.

Layout, little endian: an 8-byte magic, u32 n_layers, u32 n_pos, u32 hidden, u32 0, then n_layers × [n_pos, hidden] f32.
Dumps are written and read one layer at a time.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..formats.errors import CheckError, InputError, MqError
from ..formats.own_file import disk_errors, is_stream, open_stream
from ..formats.plain_file import open_plain
from .model.metrics import cosine

MAGIC = b"HFHS\0\0\0\0"
MAGICS = (MAGIC, b"HFHIDDEN")
_HEADER = struct.Struct("<8sIIII")


class HiddenError(MqError):
    """A file that is not a well-formed hidden-state dump."""


@dataclass(frozen=True)
class HiddenDump:
    """A dump's header; `layer` reads one layer of it."""

    path: Path
    n_layers: int
    n_pos: int
    hidden: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.n_layers, self.n_pos, self.hidden

    def layer(self, index: int) -> NDArray[np.float32]:
        """The residual stream after one layer, f32 [n_pos, hidden]."""
        count = self.n_pos * self.hidden
        values = np.fromfile(self.path, "<f4", count, offset=_HEADER.size + 4 * count * index)
        if values.size != count:
            raise HiddenError(f"ended inside layer {index} after it was opened", file=self.path)
        return values.reshape(self.n_pos, self.hidden).astype(np.float32)


def open_hidden(path: Path) -> HiddenDump:
    """Read a dump's header and hold it against the file's size; HiddenError for anything else."""
    try:
        with open_plain(path) as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(_HEADER.size)
    except OSError as e:
        raise HiddenError(f"cannot be read: {e.strerror}", file=path) from None
    if len(head) < _HEADER.size or head[:8] not in MAGICS:
        raise HiddenError("is not a hidden-state dump: it does not begin with HFHS", file=path)
    _, layers, positions, hidden, zero = _HEADER.unpack(head)
    expected = _HEADER.size + 4 * layers * positions * hidden
    if zero != 0:
        raise HiddenError(f"the last word of its header is {zero}, not 0", file=path)
    if size != expected:
        raise HiddenError(
            f"has {size} bytes, but {layers} layers of {positions} × {hidden} take {expected}", file=path
        )
    return HiddenDump(path, layers, positions, hidden)


class HiddenWriter:
    """Writes a dump layer by layer; under the final name only when every layer was written, into a pipe as it comes.

    Raises OutputError where it cannot be written.
    """

    def __init__(self, path: Path, n_layers: int, n_pos: int, hidden: int) -> None:
        self.path, self.shape, self.written = path, (n_pos, hidden), 0
        self.n_layers = n_layers
        self.partial = None if is_stream(path) else path.with_name(f".{path.name}.{os.getpid()}.partial")
        with disk_errors(path):
            self.file = open_stream(path) if self.partial is None else self.partial.open("wb")
            self.file.write(_HEADER.pack(MAGIC, n_layers, n_pos, hidden, 0))

    def add(self, values: NDArray[np.float32]) -> None:
        """Append the residual stream after the next layer, f32 [n_pos, hidden]."""
        if values.shape != self.shape or self.written == self.n_layers:
            raise ValueError(f"layer {self.written} of shape {values.shape} does not fit the dump")
        with disk_errors(self.path):
            self.file.write(np.ascontiguousarray(values, "<f4").data)
        self.written += 1

    def __enter__(self) -> HiddenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with disk_errors(self.path):
                self.file.close()  # which writes what is left
                if kind is None and self.written == self.n_layers:
                    if self.partial is not None:
                        self.partial.replace(self.path)
                    return
        finally:
            if self.partial is not None:
                with contextlib.suppress(OSError):
                    self.partial.unlink()
        if kind is None:
            raise ValueError(f"only {self.written} of {self.n_layers} layers were written")


@dataclass(frozen=True)
class LayerDistance:
    """How far two dumps are apart after one layer: cosine over positions, and the largest difference."""

    layer: int
    cosine_mean: float
    cosine_min: float
    max_difference: float


@dataclass(frozen=True)
class HiddenComparison:
    """Two dumps, layer by layer; `bar` is the mean cosine that every layer must reach.

    `findings` are sentences on where one departs from what a conformance kit asks for.
    """

    a: Path
    b: Path
    bar: float
    layers: tuple[LayerDistance, ...]
    findings: tuple[str, ...] = ()

    @property
    def under(self) -> tuple[int, ...]:
        """The layers whose mean cosine is under the bar, or is not a number."""
        return tuple(row.layer for row in self.layers if not row.cosine_mean >= self.bar)

    def as_json(self) -> dict[str, Any]:
        layers = [asdict(row) for row in self.layers]
        return {
            "a": str(self.a),
            "b": str(self.b),
            "bar": self.bar,
            "ok": not (self.under or self.findings),
            "layers": layers,
            "findings": list(self.findings),
        }

    def raise_if_failed(self) -> None:
        """CheckError with the findings, or the layers under the bar."""
        if self.findings:
            raise CheckError("; ".join(self.findings), file=self.b)
        if self.under:
            raise CheckError(f"the mean cosine of layers {list(self.under)} is under {self.bar}", file=self.a)


def compare_dumps(a: Path, b: Path, bar: float) -> HiddenComparison:
    """Compare two files; HiddenError where one is no dump, InputError where their shapes differ or are empty."""
    return HiddenComparison(a, b, bar, tuple(compare_hidden(open_hidden(a), open_hidden(b))))


def compare_hidden(a: HiddenDump, b: HiddenDump) -> Iterator[LayerDistance]:
    """Compare two dumps layer by layer; InputError where their shapes differ or they hold nothing."""
    if a.shape != b.shape:
        raise InputError(
            f"holds {a.shape} (layers, positions, hidden), and {b.path} {b.shape}",
            file=a.path,
            hint="dump both with the same model and tokens",
        )
    if 0 in a.shape:
        raise InputError("holds no values, so there is nothing to compare", file=a.path)
    for layer in range(a.n_layers):
        x, y = torch.from_numpy(a.layer(layer)), torch.from_numpy(b.layer(layer))
        cosines = cosine(x, y)
        difference = float((x.double() - y.double()).abs().max())
        yield LayerDistance(layer, float(cosines.mean()), float(cosines.min()), difference)
