"""The JSON files of a checkpoint: config.json, and the index that says which shard holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config_keys import unknown_keys
from ..errors import CheckpointError, ConfigError
from ..minimax import ModelConfig, parse_config
from ..strictjson import EMBEDDED_DEPTH, JsonError, parse_object
from ..text import shown
from ..unchanged import UnchangedFile
from .safetensors_file import TensorInfo, some
from .source import JSON_LIMIT

_QUANTIZATION = {
    "quant_method": ("fp8",),
    "fmt": ("float8_e4m3fn", "e4m3", "e4m3fn"),
    "scale_fmt": ("float", "float32", "ue8m0"),
    "activation_scheme": ("dynamic", "static"),
}
"""Keys of quantization_config that say how codes are read, with the values that are."""
CONFIG_LIMIT = 4 << 20
"""Bytes of the largest config.json that is read; the released one has a thousand."""
SHARD_LIMIT = 1 << 12
"""Shards that an index may name."""


def load_config(file: UnchangedFile) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is, and its dimensions; raises ConfigError, or the error of a file that cannot be read."""
    try:
        raw = parse_object(file.content(CONFIG_LIMIT), EMBEDDED_DEPTH)
        config = parse_config(raw)
        _check_quantization(raw.get("quantization_config") or {})
        return raw, config
    except JsonError as e:
        raise ConfigError(str(e), file=file.path) from None
    except ConfigError as e:
        raise ConfigError(e.problem, file=file.path, hint=e.hint) from None


def config_notes(raw: Mapping[str, Any], file: str | Path) -> tuple[str, ...]:
    """A sentence on the keys of config.json that mq-quant does not know, where there are such."""
    unknown = unknown_keys(raw)
    if not unknown:
        return ()
    return (f"{file} has keys that mq-quant does not know and leaves as they are: {some(unknown)}",)


def _check_quantization(quantization: Mapping[str, Any]) -> None:
    """Refuse a way of quantising that is not FP8 E4M3 with scales that multiply; ConfigError names the key."""
    for key, accepted in _QUANTIZATION.items():
        value = quantization.get(key)
        if value is not None and value not in accepted:
            raise ConfigError(
                f"config key 'quantization_config.{key}' is {shown(value)}; mq-quant reads only "
                + " or ".join(map(repr, accepted)),
                hint="give the released FP8 checkpoint, or one in BF16",
            )


def load_index(file: UnchangedFile) -> dict[str, str]:
    """{tensor name: shard} of a safetensors index; CheckpointError for shards that are not plain file names."""
    try:
        weight_map = parse_object(file.content(JSON_LIMIT)).get("weight_map")
    except JsonError as e:
        raise CheckpointError(str(e), file=file.path) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", file=file.path)
    for name, shard in weight_map.items():
        if not is_shard_name(shard):
            raise CheckpointError(
                f"names the shard {shown(shard)}, which is not a plain .safetensors file name",
                file=file.path,
                tensor=name,
            )
    if len(set(weight_map.values())) > SHARD_LIMIT:
        raise CheckpointError(f"names more than {SHARD_LIMIT} shards", file=file.path)
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


def check_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], file: UnchangedFile
) -> None:
    """The index and the shards' own headers must say the same; CheckpointError otherwise."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise CheckpointError(f"is not in {shard}, where the index puts it", file=file.path, tensor=name)
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        raise CheckpointError(f"lacks tensors that the shards hold: {some(extra)}", file=file.path)
