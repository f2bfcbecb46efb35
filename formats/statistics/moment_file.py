"""The file of one layer's moments: names, shapes, and strict reading.

A calibration leaves one such safetensors file for each layer. What its numbers are used for is the room `awq`'s part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.safetensors_file import TensorInfo, header_length, parse_header
from ..errors import CalibrationError, CheckpointError
from ..minimax import ModelConfig
from ..strictjson import dump_object
from ..unchanged import UnchangedFile

DownForm = Literal["full", "compact", "pooled"]
"""How the second moments of down's inputs are kept: per expert in f32 or as f16 correlations, or one per layer."""
DOWN_FORMS: tuple[DownForm, ...] = get_args(DownForm)

Arrays = dict[str, NDArray[Any]]

_NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
_STORED = {numpy: stored for stored, numpy in _NUMPY.items()}
CALIBRATE_AGAIN = "calibrate again, into a new folder"


def layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def triangle(k: int) -> int:
    """Entries in the upper triangle of a [k, k] matrix, its diagonal included."""
    return k * (k + 1) // 2


def layer_tensors(config: ModelConfig, down: DownForm) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of one layer's file. Moments are means of x xᵀ, packed; diagonals are means of x².

    `counts` are the tokens behind a mean: of the layer for gate_up.moment and attn, of each expert for the others.
    """
    e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn.counts": ("I64", (2,)),
        "attn.in.diagonal": ("F32", (h,)),
        "attn.out.diagonal": ("F32", (config.q_dim,)),
        "gate_up.tokens": ("I64", (1,)),
        "gate_up.moment": ("F32", (triangle(h),)),
        "gate_up.counts": ("I64", (e,)),
        "gate_up.diagonal": ("F32", (e, h)),
        "down.counts": ("I64", (e,)),
        "down.diagonal": ("F32", (e, i)),
        "down.pooled": ("F32", (triangle(i),)),
    }
    if down != "pooled":
        out["down.moment"] = ("F16" if down == "compact" else "F32", (e, triangle(i)))
    return out


@dataclass(frozen=True)
class LayerFile:
    """One layer's tensors, each read when asked for; safe for several threads."""

    path: Path
    infos: Mapping[str, TensorInfo]
    _file: UnchangedFile

    def array(self, name: str) -> NDArray[Any]:
        """A whole tensor of `layer_tensors`."""
        return self._read(self.infos[name])

    def row(self, name: str, index: int) -> NDArray[Any]:
        """One row of a tensor, nothing else of it being read."""
        info = self.infos[name]
        size = (info.stop - info.start) // info.shape[0]
        start = info.start + index * size
        return self._read(replace(info, shape=info.shape[1:], start=start, stop=start + size))

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[Any]:
        """Rows [n, ...] of a tensor, nothing else of it being read."""
        info = self.infos[name]
        size = (info.stop - info.start) // info.shape[0]

        def take(f: BufferedReader) -> bytes:
            out = bytearray(size * len(indices))
            for n, index in enumerate(indices.tolist()):
                f.seek(info.start + index * size)
                out[n * size : (n + 1) * size] = f.read(size)
            return bytes(out)

        return self._taken(replace(info, shape=(len(indices), *info.shape[1:])), take)

    def _read(self, info: TensorInfo) -> NDArray[Any]:
        def take(f: BufferedReader) -> bytes:
            f.seek(info.start)
            return f.read(info.stop - info.start)

        return self._taken(info, take)

    def _taken(self, info: TensorInfo, take: Callable[[BufferedReader], bytes]) -> NDArray[Any]:
        try:
            data = self._file.read(take)
        except CalibrationError as e:
            raise CalibrationError(e.problem, file=self.path, tensor=info.name, hint=e.hint) from None
        return np.frombuffer(data, _NUMPY[info.dtype]).reshape(info.shape)


def open_layer_file(path: Path, config: ModelConfig, down: DownForm, sha256: str | None = None) -> LayerFile:
    """One layer's file, its tensors held against `layer_tensors` on metadata, its bytes against `sha256`.

    Raises CalibrationError where they differ, and later, at a read, where the file has changed meanwhile.
    """
    return open_tensors(path, layer_tensors(config, down), sha256)


def open_tensors(
    path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]], sha256: str | None = None
) -> LayerFile:
    """A safetensors file of exactly the tensors {name: (dtype, shape)}; raises as `open_layer_file` does."""
    file = UnchangedFile(path, CalibrationError)
    infos = {info.name: info for info in file.read(lambda f: _header(f, path))}
    found = {name: (info.dtype, info.shape) for name, info in infos.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise CalibrationError(
                f"is {_shown(found.get(name))}, the manifest calls for {_shown(expected.get(name))}",
                file=path,
                tensor=name,
                hint=CALIBRATE_AGAIN,
            )
    if sha256 is not None and file.sha256() != sha256:
        raise CalibrationError("is not what the manifest says it is", file=path, hint=CALIBRATE_AGAIN)
    return LayerFile(path, infos, file)


def _header(f: BufferedReader, path: Path) -> list[TensorInfo]:
    """The tensors that the head of an open file names; CalibrationError."""
    size = f.seek(0, os.SEEK_END)
    f.seek(0)
    try:
        length = header_length(f.read(8), path)
        if 8 + length > size:
            raise CheckpointError("ends inside its header")
        return parse_header(f.read(length), path.name, size, path)
    except CheckpointError as e:
        raise CalibrationError(e.problem, file=path, tensor=e.tensor, hint=CALIBRATE_AGAIN) from None


def _shown(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def encode_layer(arrays: Arrays) -> Iterator[memoryview]:
    """The bytes of one layer's safetensors file in pieces, nothing copied; they depend on the arrays alone."""
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {}
    start = 0
    for name in order:
        array = arrays[name]
        stop = start + array.nbytes
        header[name] = {
            "dtype": _STORED[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    raw = dump_object(header)
    raw += b" " * (-len(raw) % 8)
    yield memoryview(len(raw).to_bytes(8, "little") + raw)
    for name in order:
        yield np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data
