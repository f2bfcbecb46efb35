"""MiniMax-M2 checkpoints as a source of weights: the inventory checked on metadata, then one tensor at a time.

`Source` is what the pipeline asks of a checkpoint wherever it lies; `Checkpoint` is one in a local folder.
Depends on numpy, and on shards, fp8, minimax, strictjson and errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, ConfigError, WeightError
from ..fp8 import dequantize, scale_shape
from ..minimax import ModelConfig, inventory, is_mtp, parse_config, scale_inv_name
from ..strictjson import JsonError, parse_object
from .names import CONFIG, INDEX, SIDE_FILES, SINGLE
from .safetensors_file import TensorInfo, by_name, read_header, read_tensor

JSON_LIMIT = 32 << 20
SHARD_LIMIT = 1 << 12
SHOWN = 8
HASHERS = 4
"""Files hashed at a time: a full checkpoint is read at the speed of the disk."""

_SCALE_SUFFIX = "_scale_inv"
_DTYPES = {"fp8": ("F8_E4M3",), "bf16": ("BF16", "F32"), "f32": ("F32", "BF16")}
_REFETCH = "fetch the shard again"

F32 = NDArray[np.float32]


class Source(Protocol):
    """A checkpoint that hands out one tensor at a time, wherever it lies."""

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it is."""
        ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor that the shards hold, scales and skipped ones included."""
        ...

    @property
    def shards(self) -> tuple[str, ...]: ...

    @property
    def skipped_mtp(self) -> tuple[str, ...]:
        """Names that belong to multi-token-prediction modules, which are left out."""
        ...

    @property
    def origin(self) -> dict[str, str]:
        """Where it came from: a folder's name, or a repository and its resolved revision."""
        ...

    def validate(self) -> None:
        """Check the whole inventory against the config on metadata alone; raises CheckpointError."""
        ...

    def side_file(self, name: str) -> Path | None:
        """The path of one of SIDE_FILES, or None where the checkpoint has none."""
        ...

    def schedule(self, names: Sequence[str]) -> None:
        """Say which weights will be asked for, and about in which order; each is released once.

        Between the two calls a weight may be asked for any number of times, out of order too.
        """
        ...

    def weight(self, name: str) -> F32:
        """One tensor, dequantised to f32; raises WeightError for NaN codes and non-finite values."""
        ...

    def rows(self, name: str, low: int, high: int) -> F32:
        """Rows low to high of a tensor that is not FP8, as `weight`: a large one is never held whole."""
        ...

    def release(self, name: str) -> None:
        """Say that a weight of the schedule is not needed again."""
        ...

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """{file name: {bytes, sha256}} of config, side files and shards: equal exactly for equal checkpoints."""
        ...

    def disk_bytes(self) -> int:
        """The most disk that fetched shards will take at any time."""
        ...

    def close(self) -> None:
        """Stop what runs in the background and remove what was fetched."""
        ...


class Checkpoint:
    """A checkpoint in a local folder: `model.safetensors`, or shards and their index. Safe for several threads.

    Opening reads config.json and all shard headers and raises ConfigError or CheckpointError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                "is not a folder", file=path, hint="--source takes a checkpoint folder or a hub repository"
            )
        self.raw_config, self.config = load_config(self.path / CONFIG)
        if (self.path / SINGLE).is_file():
            self.shards: tuple[str, ...] = (SINGLE,)
            weight_map = None
        else:
            weight_map = load_index(self.path / INDEX)
            self.shards = tuple(sorted(set(weight_map.values())))
        missing = [s for s in self.shards if not (self.path / s).is_file()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(self.shards)} shards are missing: {_some(missing)}",
                file=path,
                hint="fetch the missing shards",
            )
        self.tensors: Mapping[str, TensorInfo] = by_name(
            (read_header(self.path / s) for s in self.shards), self.path
        )
        if weight_map is not None:
            check_index(weight_map, self.tensors, self.path / INDEX)
        self.skipped_mtp = tuple(name for name in self.tensors if is_mtp(name, self.config))

    @property
    def origin(self) -> dict[str, str]:
        return {"folder": self.path.resolve().name}

    def validate(self) -> None:
        """Check the whole inventory against the config on metadata alone; CheckpointError names what is wrong."""
        check_inventory(self.tensors, self.config, self.path)

    def side_file(self, name: str) -> Path | None:
        """The path of one of SIDE_FILES, or None where the folder has none."""
        if name not in SIDE_FILES:
            raise ValueError(f"{name!r} is not a side file of a checkpoint")
        path = self.path / name
        return path if path.is_file() else None

    def schedule(self, names: Sequence[str]) -> None:
        """Nothing to prepare: local tensors can be read in any order."""

    def weight(self, name: str) -> F32:
        """One tensor, dequantised to f32; CheckpointError if there is none, WeightError if it is not finite."""
        return read_weight(name, self.tensors, self.config, self._read, self.path)

    def rows(self, name: str, low: int, high: int) -> F32:
        """Rows low to high of a tensor that is not FP8, as `weight`."""
        return read_rows(name, low, high, self.tensors, self._read, self.path)

    def _read(self, info: TensorInfo) -> NDArray[np.uint8]:
        return read_tensor(self.path / info.shard, info)

    def release(self, name: str) -> None:
        """Nothing to give back: no tensor is kept."""

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """{file name: {bytes, sha256}} of config, side files and shards; reads every byte of them."""
        sides = [n for n in SIDE_FILES if (self.path / n).is_file()]
        names = (CONFIG, *sides, *self.shards)
        with ThreadPoolExecutor(HASHERS) as pool:
            return dict(zip(names, pool.map(lambda n: file_record(self.path / n), names), strict=True))

    def disk_bytes(self) -> int:
        """Nothing is fetched."""
        return 0

    def close(self) -> None:
        """Nothing is held open."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder; raises ConfigError or CheckpointError."""
    return Checkpoint(path)


def load_config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is, and its dimensions; raises ConfigError."""
    try:
        raw = _load_object(path)
        return raw, parse_config(raw)
    except CheckpointError as e:
        raise ConfigError(e.problem, file=path, hint=e.hint) from None
    except ConfigError as e:
        raise ConfigError(e.problem, file=path, hint=e.hint) from None


def load_index(path: Path) -> dict[str, str]:
    """{tensor name: shard} of a safetensors index; CheckpointError for shards that are not plain file names."""
    weight_map = _load_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", file=path)
    for name, shard in weight_map.items():
        if not is_shard_name(shard):
            raise CheckpointError(
                f"names the shard {shard!r}, which is not a plain .safetensors file name",
                file=path,
                tensor=name,
            )
    if len(set(weight_map.values())) > SHARD_LIMIT:
        raise CheckpointError(f"names more than {SHARD_LIMIT} shards", file=path)
    return weight_map


def is_shard_name(name: Any) -> bool:
    """Whether a name from a file is a plain file name, which can never lead out of its folder."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.endswith(".safetensors")
        and len(name.encode("utf-8")) <= 255
        and not name.startswith(".")
        and not set(name) & set("/\\:\0")
    )


def check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], file: Path) -> None:
    """The index and the shards' own headers must say the same; CheckpointError otherwise."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise CheckpointError(f"is not in {shard}, where the index puts it", file=file, tensor=name)
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        raise CheckpointError(f"lacks tensors that the shards hold: {_some(extra)}", file=file)


def check_inventory(tensors: Mapping[str, TensorInfo], config: ModelConfig, file: str | Path) -> None:
    """Hold all tensors against what the config calls for: names, dtypes, shapes, scales; CheckpointError."""
    problems = list(islice(_problems(tensors, config), SHOWN + 1))
    if not problems:
        return
    hint = "the shards and config.json are not of one model, or the checkpoint is incomplete"
    if len(problems) == 1:
        name, text = problems[0]
        raise CheckpointError(text, file=file, tensor=name, hint=hint)
    lines = [f"\n  {name}: {text}" for name, text in problems[:SHOWN]]
    more = "\n  and more" if len(problems) > SHOWN else ""
    raise CheckpointError(
        "the tensors do not fit the config:" + "".join(lines) + more, file=file, tensor=None, hint=hint
    )


def _problems(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(tensor, what is wrong with it), lazily: a config of absurd size costs nothing past the first problems."""
    known: set[str] = set()
    for spec in inventory(config):
        known.add(spec.name)
        info = tensors.get(spec.name)
        if info is None:
            yield spec.name, "is missing"
            continue
        if info.dtype not in _DTYPES[spec.stored]:
            yield spec.name, f"is {info.dtype}, not {' or '.join(_DTYPES[spec.stored])}"
        if info.shape != spec.shape:
            yield spec.name, f"has shape {list(info.shape)}, the config calls for {list(spec.shape)}"
        elif spec.stored == "fp8" and info.dtype == "F8_E4M3":
            scale = scale_inv_name(spec.name)
            known.add(scale)
            yield from _scale_problems(tensors.get(scale), scale, scale_shape(info.shape, config.block_shape))
    for name in tensors:
        if name in known or is_mtp(name, config):
            continue
        if name.endswith(_SCALE_SUFFIX):
            weight = tensors.get(name.removesuffix(_SCALE_SUFFIX))
            yield (
                name,
                "is a scale without its weight" if weight is None else "scales a weight that is not FP8",
            )
        else:
            yield name, "is not a tensor of this model"


def _scale_problems(scale: TensorInfo | None, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    if scale is None:
        yield name.removesuffix(_SCALE_SUFFIX), f"is FP8, but its scale {name} is missing"
    elif scale.dtype != "F32" or scale.shape != shape:
        yield name, f"is {scale.dtype} {list(scale.shape)}, but its weight needs F32 {list(shape)}"


def read_weight(
    name: str,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    read: Callable[[TensorInfo], NDArray[np.uint8]],
    where: str | Path,
) -> F32:
    """Dequantise one tensor to f32; `read` gives the stored bytes of a tensor, `where` is named in errors.

    Raises CheckpointError where it or its scale is missing, WeightError for NaN codes and non-finite values.
    """
    if name not in tensors:
        raise CheckpointError("no such tensor in the checkpoint", file=where, tensor=name)
    info = tensors[name]
    file = f"{where}/{info.shard}"
    stored = read(info)
    try:
        if info.dtype == "F8_E4M3":
            scale = tensors.get(scale_inv_name(name))
            if scale is None or scale.dtype != "F32" or len(info.shape) != 2:
                raise WeightError("is FP8 without an F32 block scale")
            scales = _plain(read(scale), scale)
            return dequantize(stored.reshape(info.shape), scales, config.block_shape)
        return _finite(_plain(stored, info))
    except WeightError as e:
        raise WeightError(e.problem, file=file, tensor=name, hint=e.hint) from None


def read_rows(
    name: str,
    low: int,
    high: int,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[TensorInfo], NDArray[np.uint8]],
    where: str | Path,
) -> F32:
    """Rows low to high of a tensor stored as plain floats, f32 [high - low, ...]; errors as read_weight."""
    if name not in tensors:
        raise CheckpointError("no such tensor in the checkpoint", file=where, tensor=name)
    info = tensors[name]
    if not (info.shape and 0 <= low <= high <= info.shape[0]):
        raise ValueError(f"rows {low}:{high} are not inside shape {info.shape} of {name}")
    each = (info.stop - info.start) // info.shape[0]
    part = replace(
        info,
        shape=(high - low, *info.shape[1:]),
        start=info.start + low * each,
        stop=info.start + high * each,
    )
    try:
        return _finite(_plain(read(part), part))
    except WeightError as e:
        raise WeightError(e.problem, file=f"{where}/{info.shard}", tensor=name, hint=e.hint) from None


def _finite(values: F32) -> F32:
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise WeightError(f"{bad} of {values.size} values are not finite", hint=_REFETCH)
    return values


def _plain(stored: NDArray[np.uint8], info: TensorInfo) -> F32:
    """Stored bytes of a float type as f32 of the tensor's shape."""
    if info.dtype == "BF16":
        return (stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(info.shape)
    if info.dtype not in ("F32", "F16"):
        raise WeightError(f"is {info.dtype}, which is no weight")
    return stored.view("<f4" if info.dtype == "F32" else "<f2").astype(np.float32).reshape(info.shape)


def file_record(path: Path) -> dict[str, Any]:
    """{bytes, sha256} of a file, read in chunks; CheckpointError if it cannot be."""
    try:
        with path.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
            return {"bytes": f.tell(), "sha256": digest}
    except OSError as e:
        raise CheckpointError(f"cannot be read: {e.strerror}", file=path) from None


def _load_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as f:
            raw = f.read(JSON_LIMIT + 1)
    except OSError as e:
        raise CheckpointError(
            f"cannot be read: {e.strerror}", file=path, hint="is this the folder of a checkpoint?"
        ) from None
    if len(raw) > JSON_LIMIT:
        raise CheckpointError(f"is larger than {JSON_LIMIT} bytes", file=path)
    try:
        return parse_object(raw)
    except JsonError as e:
        raise CheckpointError(str(e), file=path) from None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more
