"""What a file says it was made from, read into types.

The record may have been edited, or written by another program: what is not of the expected type counts as absent, and
nothing here raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .container import HfqFile

KEY = "mq_quant"
"""The key of the metadata under which the record stands."""
PADDING = "reserved"
"""The key inside the record that only fills up the metadata to their planned length."""
_DIGITS = 16


@dataclass(frozen=True)
class ProgramRecord:
    """The program that made the file; the commit is known where it ran from a checkout."""

    name: str | None
    version: str | None
    commit: str | None


@dataclass(frozen=True)
class RecipeRecord:
    """The recipe as it was resolved: `document` is all of it, the other fields are what commands look at."""

    document: Mapping[str, Any]
    tier: str | None
    fit: str | None
    model: str | None
    repository: str | None
    folds_down: bool


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint: its folder or its repository and revision, and the SHA-256 of each of its files."""

    origin: Mapping[str, Any]
    files: Mapping[str, str]


@dataclass(frozen=True)
class InputRecord:
    """An imatrix or a calibration: its SHA-256, and `document`, all that is said of it."""

    document: Mapping[str, Any]
    sha256: str | None


@dataclass(frozen=True)
class Provenance:
    """The record of the build. `document` is the whole of it, empty where the file has none."""

    document: Mapping[str, Any]
    program: ProgramRecord
    recipe: RecipeRecord | None
    source: SourceRecord | None
    imatrix: InputRecord | None
    calibration: InputRecord | None
    layers: tuple[Mapping[str, Any], ...]
    checksums: tuple[str, ...]
    """XXH64 of each tensor's payload in file order, 16 hexadecimal digits each."""
    metadata_checksum: str | None

    @classmethod
    def of(cls, file: HfqFile) -> Provenance:
        """The provenance of an open file."""
        return cls.read(file.metadata)

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> Provenance:
        """The provenance in a file's metadata."""
        document = {key: value for key, value in _object(metadata.get(KEY)).items() if key != PADDING}
        program = _object(document.get("program"))
        layers = document.get("layers")
        return cls(
            document,
            ProgramRecord(*(_text(program.get(key)) for key in ("name", "version", "commit"))),
            _recipe(document.get("recipe")),
            _source(document.get("source")),
            _input(document.get("imatrix")),
            _input(document.get("calibration")),
            tuple(layer for layer in layers if isinstance(layer, Mapping))
            if isinstance(layers, list)
            else (),
            _checksums(_object(document.get("checksums")).get("values")),
            _text(document.get("metadata_checksum")),
        )

    @property
    def tuned_layers(self) -> frozenset[int]:
        """The layers that were tuned after they were rounded, as far as the record says so."""
        told = ((layer.get("layer"), _object(layer.get("tuning")).get("kept")) for layer in self.layers)
        return frozenset(layer for layer, kept in told if isinstance(layer, int) and kept is True)

    @property
    def calibration_tokens(self) -> int | None:
        """The number of tokens that the experts' statistics were gathered on, where the record says so."""
        tokens = _object(self.calibration.document.get("tokens")) if self.calibration else {}
        counts = [tokens.get(key) for key in ("sequences", "length")]
        whole = [count for count in counts if type(count) is int]
        return whole[0] * whole[1] if len(whole) == len(counts) else None

    def as_json(self) -> dict[str, Any]:
        """The record as it stands in the metadata."""
        return dict(self.document)


def stated_quantization_hash(metadata: Mapping[str, Any]) -> str | None:
    """The quantization hash that a file's metadata state, None where they state none."""
    return _text(_object(metadata.get("quantization_hash")).get("value"))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _recipe(value: Any) -> RecipeRecord | None:
    if not isinstance(value, Mapping):
        return None
    model = _object(value.get("model"))
    return RecipeRecord(
        value,
        _text(value.get("tier")),
        _text(value.get("fit")),
        _text(model.get("name")),
        _text(_object(model.get("source")).get("repository")),
        bool(_object(value.get("awq")).get("fold_down")),
    )


def _source(value: Any) -> SourceRecord | None:
    if not isinstance(value, Mapping):
        return None
    files = {name: _text(_object(file).get("sha256")) for name, file in _object(value.get("files")).items()}
    return SourceRecord(_object(value.get("origin")), {name: sha for name, sha in files.items() if sha})


def _input(value: Any) -> InputRecord | None:
    return InputRecord(value, _text(value.get("sha256"))) if isinstance(value, Mapping) else None


def _checksums(value: Any) -> tuple[str, ...]:
    text = _text(value) or ""
    return (
        tuple(text[i : i + _DIGITS] for i in range(0, len(text), _DIGITS)) if len(text) % _DIGITS == 0 else ()
    )
