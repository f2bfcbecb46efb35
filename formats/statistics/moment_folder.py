"""A calibration folder: what a run of the model on text left behind, a file of moments for each layer and a manifest.

The manifest is written last, so a folder without one is unfinished. This module reads finished folders.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import CalibrationError
from ..minimax import ModelConfig
from ..strictjson import JsonError, parse_object
from ..unchanged import UnchangedFile
from .moment_file import CALIBRATE_AGAIN, DownForm, LayerFile, layer_file, open_layer_file

SCHEMA = 1
MANIFEST = "manifest.json"
IMATRIX = "imatrix.gguf"
MANIFEST_LIMIT = 16 << 20
DIMENSION_LIMIT = 1 << 20
"""No dimension of a model whose moments can be held reaches this."""


def _dimensions(config: Any) -> Any:
    """JSON's form of a ModelConfig as its fields; ValueError for keys that it does not have."""
    if not isinstance(config, dict):
        return config
    unknown = sorted(set(config) - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise ValueError(f"holds {unknown[0]!r}, which this program does not know")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class LayerRecord(_Part):
    """What a manifest says of one layer: its file, the experts that saw no token, and what was left out."""

    nbytes: int = Field(alias="bytes", ge=0)
    sha256: str
    unseen: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


class FileRecord(_Part):
    """One file of the source."""

    sha256: str


class SourceRecord(_Part):
    """The checkpoint whose activations were gathered."""

    origin: dict[str, str]
    files: dict[str, FileRecord]


class Manifest(_Part):
    """A manifest's keys that reading needs; further ones are ignored."""

    schema_version: int = Field(alias="schema")
    config: Annotated[ModelConfig, BeforeValidator(_dimensions)]
    source: SourceRecord
    tokens: dict[str, Any]
    down: DownForm
    layers: tuple[LayerRecord, ...]


@dataclass(frozen=True)
class Calibration:
    """An opened folder: its manifest, and the sha256 of the manifest's bytes."""

    folder: Path
    manifest: Manifest
    sha256: str

    @property
    def config(self) -> ModelConfig:
        """The dimensions of the model whose activations were gathered."""
        return self.manifest.config

    @property
    def down(self) -> DownForm:
        """How the moments of down's inputs are kept."""
        return self.manifest.down

    def layer(self, layer: int) -> LayerFile:
        """One layer's file, its bytes held against the manifest; CalibrationError where they differ."""
        sha256 = self.manifest.layers[layer].sha256
        return open_layer_file(self.folder / layer_file(layer), self.config, self.down, sha256)


def open_calibration(folder: str | Path) -> Calibration:
    """Open a finished folder: its manifest, and every layer's file on metadata; CalibrationError."""
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
    raw = UnchangedFile(path, CalibrationError).content(MANIFEST_LIMIT)
    calibration = Calibration(folder, _manifest(raw, path), hashlib.sha256(raw).hexdigest())
    for layer, record in enumerate(calibration.manifest.layers):
        file = folder / layer_file(layer)
        if not file.is_file() or file.stat().st_size != record.nbytes:
            raise CalibrationError(
                "is missing or not of the manifest's size", file=file, hint=CALIBRATE_AGAIN
            )
        open_layer_file(file, calibration.config, calibration.down)
    return calibration


def _manifest(raw: bytes, path: Path) -> Manifest:
    try:
        schema = parse_object(raw).get("schema")
    except JsonError as e:
        raise CalibrationError(str(e), file=path, hint=CALIBRATE_AGAIN) from None
    if schema != SCHEMA:
        raise CalibrationError(
            f"has schema {schema!r}, this program reads {SCHEMA}",
            file=path,
            hint="calibrate again, or use the program that made it",
        )
    try:
        manifest = Manifest.model_validate_json(raw)
        _check_dimensions(manifest)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"{where}: {first['msg']}"
    except ValueError as e:
        problem = str(e)
    else:
        return manifest
    raise CalibrationError(f"is not a whole manifest: {problem}", file=path, hint=CALIBRATE_AGAIN)


def _check_dimensions(manifest: Manifest) -> None:
    """ValueError where the dimensions are absurd, or do not fit the number of layers."""
    config = manifest.config
    for name, value in asdict(config).items():
        if isinstance(value, int) and not 0 < value < DIMENSION_LIMIT:
            raise ValueError(f"config.{name} is {value}, not between 1 and {DIMENSION_LIMIT - 1}")
    if len(manifest.layers) != config.num_hidden_layers:
        raise ValueError(f"it lists {len(manifest.layers)} layers of {config.num_hidden_layers}")


def config_record(config: ModelConfig) -> dict[str, Any]:
    """The dimensions of a model as a manifest holds them."""
    return {**asdict(config), "block_shape": list(config.block_shape)}
