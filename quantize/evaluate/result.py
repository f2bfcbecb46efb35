"""What an evaluation found: what `evaluate --json` prints, its output file holds, and model cards read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ...formats.errors import CheckError, InputError
from ...formats.plain_file import open_plain
from ...formats.strictjson import JsonError, finite, parse_object
from ...verify.model.metrics import DivergenceSummary, LayerFigures

SCHEMA = 1
LIMIT = 64 << 20
"""Bytes of the largest evaluation that is read."""
ReferenceKind = Literal["source", "saved", "llama.cpp"]
"""What files were compared with: the source beside them, its saved predictions, or those that llama.cpp saved."""


@dataclass(frozen=True)
class TokensRecord:
    """The tokens that were run. `text` is the SHA-256 of the text that comes with mq-quant, None for other tokens."""

    sha256: str
    sequences: int
    length: int
    text: str | None = None


@dataclass(frozen=True)
class EvaluatedFile:
    """One file beside the source. `calibration_tokens` are those that its build gathered on, as far as it says so;
    `layers` is empty where the source itself was not run.
    """

    name: str
    tier: str | None
    bytes: int
    quantization_hash: str | None
    divergence: DivergenceSummary
    calibration_tokens: int | None = None
    layers: tuple[LayerFigures, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Files beside one source, on the same tokens. `source` says where it lies; `seconds` and memory are of the last
    run, which may have continued an earlier one.
    """

    program: Mapping[str, Any]
    source: Mapping[str, Any]
    reference: ReferenceKind
    tokens: TokensRecord
    files: tuple[EvaluatedFile, ...]
    notes: tuple[str, ...]
    resumed_layers: int
    seconds: float
    peak_rss_bytes: int
    schema: int = SCHEMA

    def as_json(self) -> dict[str, Any]:
        """What `evaluate --json` prints and its output holds."""
        return dict(finite(asdict(self)))

    def raise_if_broken(self) -> None:
        """CheckError that names the files whose predictions are not numbers."""
        broken = [f.name for f in self.files if not math.isfinite(f.divergence.kld_mean)]
        if broken:
            raise CheckError(
                f"the predictions of {', '.join(broken)} are not numbers",
                hint="mq-quant verify FILE says more",
            )

    def of(self, quantization_hash: str | None) -> EvaluatedFile | None:
        """What was found of the file with this quantization hash."""
        return next(
            (f for f in self.files if quantization_hash and f.quantization_hash == quantization_hash), None
        )


_UNKNOWN = ("kld", "ppl", "routing", "cosine", "error")
"""How figures begin that may be unknown."""
_ADAPTER = TypeAdapter(Evaluation)


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file that `evaluate` wrote; InputError where it is none."""
    hint = "give the file that `mq-quant evaluate` wrote"
    try:
        with open_plain(path) as f:
            raw = f.read(LIMIT + 1)
    except OSError as e:
        raise InputError(f"cannot be read: {e.strerror}", file=path, hint=hint) from None
    try:
        found = _ADAPTER.validate_python(_with_numbers(parse_object(raw)))
    except (JsonError, ValidationError) as e:
        problem = str(e).splitlines()[0] if isinstance(e, JsonError) else _first(e)
        raise InputError(f"is no evaluation: {problem}", file=path, hint=hint) from None
    if found.schema != SCHEMA:
        raise InputError(f"has schema {found.schema}, and this program reads {SCHEMA}", file=path, hint=hint)
    return found


def _with_numbers(value: Any) -> Any:
    """Figures that are not known stand as null in JSON and are NaN here."""
    if isinstance(value, list):
        return [_with_numbers(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: float("nan") if part is None and key.startswith(_UNKNOWN) else _with_numbers(part)
        for key, part in value.items()
    }


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
