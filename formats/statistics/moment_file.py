"""Calibration folders: what a run of the model on text left behind, one safetensors file per layer and a manifest.

Only the bytes: names, shapes, the packing of symmetric matrices, and strict reading; what the numbers are used for is
policy. The manifest is written last, so that a folder without one is unfinished. Depends on numpy, and on shards,
strictjson, minimax and errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.safetensors_file import TensorInfo, read_header, read_tensor
from ..errors import CalibrationError, CheckpointError
from ..minimax import ModelConfig
from ..strictjson import JsonError, dump_object, parse_object

SCHEMA = 1
MANIFEST = "manifest.json"
IMATRIX = "imatrix.gguf"
MANIFEST_LIMIT = 16 << 20

DownForm = Literal["full", "compact", "pooled"]
"""How the second moments of down's inputs are kept: per expert in f32 or as f16 correlations, or one per layer."""
DOWN_FORMS: tuple[DownForm, ...] = get_args(DownForm)

F64 = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

_NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
_STORED = {numpy: stored for stored, numpy in _NUMPY.items()}
_AGAIN = "calibrate again, into a new folder"


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


def pack_moment(moment: F64) -> NDArray[np.float32]:
    """The upper triangle, row by row, of a symmetric f64 [k, k], as f32 [k(k+1)/2]."""
    return _upper(moment.astype(np.float32))


def _upper(matrix: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([row[i:] for i, row in enumerate(matrix)])


def unpack_moment(packed: NDArray[Any], k: int) -> F64:
    """The symmetric f64 [k, k] of a packed upper triangle."""
    out = np.empty((k, k))
    start = 0
    for i in range(k):
        out[i, i:] = out[i:, i] = packed[start : start + k - i]
        start += k - i
    return out


def pack_correlation(moment: F64) -> NDArray[np.float16]:
    """The correlations m_ij / √(m_ii m_jj) of a second moment, packed, f16; 0 where a channel is silent."""
    root = np.sqrt(np.diag(moment))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return _upper((moment * inverse[:, None] * inverse).astype(np.float16))


def unpack_correlation(packed: NDArray[np.float16], diagonal: NDArray[Any]) -> F64:
    """The second moment f64 [k, k] of packed correlations and its exact diagonal [k]."""
    exact = diagonal.astype(np.float64)
    root = np.sqrt(exact)
    out = unpack_moment(packed, len(exact))
    out *= root[:, None] * root  # in this order the result is symmetric to the last bit
    np.fill_diagonal(out, exact)
    return out


@dataclass(frozen=True)
class Calibration:
    """An opened folder: `manifest` as it is, `sha256` of its bytes, and the layers' files by number."""

    folder: Path
    manifest: Mapping[str, Any]
    sha256: str
    config: ModelConfig
    down: DownForm

    def layer(self, layer: int) -> LayerFile:
        """One layer's file, its bytes held against the manifest; CalibrationError where they differ."""
        record, path = self.manifest["layers"][layer], self.folder / layer_file(layer)
        with path.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != record["sha256"]:
                raise CalibrationError("is not what the manifest says it is", file=path, hint=_AGAIN)
        return LayerFile(path, layer_infos(path, self.config, self.down))


@dataclass(frozen=True)
class LayerFile:
    """One layer's tensors, each read when asked for; safe for several threads."""

    path: Path
    infos: Mapping[str, TensorInfo]

    def array(self, name: str) -> NDArray[Any]:
        """A whole tensor of `layer_tensors`."""
        return self._read(self.infos[name])

    def row(self, name: str, index: int) -> NDArray[Any]:
        """One row of a tensor, nothing else of it being read."""
        info = self.infos[name]
        size = (info.stop - info.start) // info.shape[0]
        start = info.start + index * size
        return self._read(replace(info, shape=info.shape[1:], start=start, stop=start + size))

    def _read(self, info: TensorInfo) -> NDArray[Any]:
        try:
            return read_tensor(self.path, info).view(_NUMPY[info.dtype]).reshape(info.shape)
        except CheckpointError as e:
            raise CalibrationError(e.problem, file=self.path, tensor=info.name, hint=_AGAIN) from None


def layer_infos(path: Path, config: ModelConfig, down: DownForm) -> dict[str, TensorInfo]:
    """The tensors of one layer's file by name, held against `layer_tensors` on metadata; CalibrationError."""
    try:
        infos = {info.name: info for info in read_header(path)}
    except CheckpointError as e:
        raise CalibrationError(e.problem, file=path, tensor=e.tensor, hint=_AGAIN) from None
    expected = layer_tensors(config, down)
    found = {name: (info.dtype, info.shape) for name, info in infos.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise CalibrationError(
                f"is {_shown(found.get(name))}, the manifest calls for {_shown(expected.get(name))}",
                file=path,
                tensor=name,
                hint=_AGAIN,
            )
    return infos


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


def open_calibration(folder: str | Path) -> Calibration:
    """Open a finished folder: manifest, schema, every layer's file on metadata; CalibrationError."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CalibrationError("is not a folder", file=folder, hint="mq-quant calibrate -o makes one")
    if not path.is_file():
        raise CalibrationError(
            f"has no {MANIFEST}: its calibration has not finished, or it holds something else",
            file=folder,
            hint="run the same mq-quant calibrate again to finish it",
        )
    raw = _bytes(path)
    try:
        manifest = parse_object(raw)
    except JsonError as e:
        raise CalibrationError(str(e), file=path, hint=_AGAIN) from None
    schema = manifest.get("schema")
    if schema != SCHEMA:
        raise CalibrationError(
            f"has schema {schema!r}, this program reads {SCHEMA}",
            file=path,
            hint="calibrate again, or use the program that made it",
        )
    config, down = _manifest_config(manifest, path)
    calibration = Calibration(folder, manifest, hashlib.sha256(raw).hexdigest(), config, down)
    for layer, record in enumerate(manifest["layers"]):
        file = folder / layer_file(layer)
        if not file.is_file() or file.stat().st_size != record["bytes"]:
            raise CalibrationError("is missing or not of the manifest's size", file=file, hint=_AGAIN)
        layer_infos(file, config, down)
    return calibration


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            raw = f.read(MANIFEST_LIMIT + 1)
    except OSError as e:
        raise CalibrationError(f"cannot be read: {e.strerror}", file=path) from None
    if len(raw) > MANIFEST_LIMIT:
        raise CalibrationError(f"is larger than {MANIFEST_LIMIT} bytes", file=path)
    return raw


def config_record(config: ModelConfig) -> dict[str, Any]:
    """The dimensions of a model as a manifest holds them."""
    return {**asdict(config), "block_shape": list(config.block_shape)}


def _manifest_config(manifest: Mapping[str, Any], path: Path) -> tuple[ModelConfig, DownForm]:
    """The dimensions and the form of the down moments, everything else that reading needs being checked too."""
    try:
        record = dict(manifest["config"])
        config = ModelConfig(**{**record, "block_shape": tuple(record["block_shape"])})
        sizes = (config.hidden_size, config.intermediate_size, config.num_local_experts, config.q_dim)
        layers = manifest["layers"]
        good = (
            all(type(n) is int and 0 < n < 1 << 20 for n in sizes)
            and manifest["down"] in DOWN_FORMS
            and isinstance(layers, list)
            and len(layers) == config.num_hidden_layers
            and all(type(r["bytes"]) is int and isinstance(r["sha256"], str) for r in layers)
            and isinstance(manifest["source"]["files"], dict)
            and isinstance(manifest["source"]["origin"], dict)
        )
    except (KeyError, TypeError, AttributeError):
        raise CalibrationError("is not a whole manifest", file=path, hint=_AGAIN) from None
    if not good:
        raise CalibrationError("is not a whole manifest", file=path, hint=_AGAIN)
    return config, manifest["down"]
