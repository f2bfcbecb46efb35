"""What each piece of a model loses in each format, as `mq-quant measure` wrote it down, to be shared and read again.

A piece is one projection of one layer, of all its experts: gate and up together, or down. Its loss in a format is what
rounding it adds to the KLD, in nats per token, of a file whose experts are not rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...formats.blocks import EXPERT_FORMATS, FORMATS
from ...formats.errors import MeasurementError
from ...formats.minimax import ModelConfig
from ...formats.plain_file import open_plain
from ...formats.strictjson import JsonError, parse_object

KIND: Literal["mq-quant measurement"] = "mq-quant measurement"
VERSION: Literal[1] = 1
LIMIT = 4 << 20
"""Bytes of the largest measurement that is read."""
HINT = "give a file that `mq-quant measure` wrote"

Projection = Literal["gate_up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate_up", "down")
EXPERT_NAMES = tuple(
    f.name for f in sorted((FORMATS[number] for number in EXPERT_FORMATS), key=lambda f: f.group_bytes)
)
"""The formats in which the engine runs experts, by their bits."""


def _expert_format(name: str) -> str:
    if name not in EXPERT_NAMES:
        raise ValueError(f"the engine runs experts in {', '.join(EXPERT_NAMES)}, not in {name!r}")
    return name


FormatName = Annotated[str, AfterValidator(_expert_format)]
MOST = 1e6
"""Nats that no loss reaches, so that sums stay finite."""
Loss = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MeasuredModel(_Part):
    """The model: its name for people, its dimensions, where it was read, and the SHA-256 of each of its files."""

    name: str
    layers: Count
    hidden: Count
    intermediate: Count
    experts: Count
    experts_per_token: Count
    vocabulary: Count
    origin: dict[str, str]
    files: dict[str, Sha256] = Field(min_length=1)


class MeasuredText(_Part):
    """Some tokens."""

    tokens: Count
    sha256: Sha256


class Piece(_Part):
    """One projection of one layer, and the KLD of a file with only this piece rounded, by the name of the format."""

    layer: Annotated[int, Field(ge=0)]
    projection: Projection
    kld: dict[FormatName, Loss]


class Measurement(_Part):
    """All pieces of a model, layer by layer, gate and up before down.

    `text` are the tokens on which predictions were compared, others than those that importances were gathered from.
    What is known of these: `calibration` are the tokens where the model was run on some, `imatrix` the SHA-256 of one.
    `rest` is the KLD of a file whose experts are not rounded, `whole` that of files with all pieces rounded, by what
    `whole_name` calls the formats of gate and up and of down.
    """

    kind: Literal["mq-quant measurement"] = KIND
    version: Literal[1] = VERSION
    model: MeasuredModel
    effort: Literal["imatrix", "calibrated"]
    text: MeasuredText
    calibration: MeasuredText | None = None
    imatrix: Sha256 | None = None
    formats: tuple[FormatName, ...] = Field(min_length=1, strict=False)
    pieces: tuple[Piece, ...] = Field(strict=False)
    rest: Loss
    whole: dict[str, Loss] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_complete(self) -> Measurement:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("names a format twice")
        if len(self.pieces) != len(PROJECTIONS) * self.model.layers:
            raise ValueError(
                f"holds {len(self.pieces)} pieces, not gate_up and down of {self.model.layers} layers"
            )
        for number, piece in enumerate(self.pieces):
            layer, projection = number // len(PROJECTIONS), PROJECTIONS[number % len(PROJECTIONS)]
            if (piece.layer, piece.projection) != (layer, projection):
                raise ValueError(f"layer {layer} {projection} is not where it belongs")
        for piece in self.pieces:
            if set(piece.kld) != set(self.formats):
                raise ValueError(
                    f"layer {piece.layer} {piece.projection} has not just the formats that were measured"
                )
        if not any(self.loss(p.layer, p.projection, name) for p in self.pieces for name in self.formats):
            raise ValueError(
                "says that no piece loses anything beside the rest, so nothing can be chosen by it"
            )
        for name in self.whole:
            if not set(whole_formats(name)) <= set(self.formats):
                raise ValueError(f"whole holds {name!r}, which is made of formats that were not measured")
        return self

    def loss(self, layer: int, projection: Projection, name: str) -> float:
        """How much KLD this piece adds to the rest in the format of this name."""
        return max(self.pieces[2 * layer + PROJECTIONS.index(projection)].kld[name] - self.rest, 0.0)

    def text_json(self) -> str:
        """The measurement as its file holds it, a line for each piece."""
        document = self.model_dump(mode="json")
        pieces = ",\n  ".join(json.dumps(piece) for piece in document.pop("pieces"))
        head = json.dumps(document, indent=1).removesuffix("\n}")
        return f'{head},\n "pieces": [\n  {pieces}\n ]\n}}\n'

    def check_model(
        self,
        config: ModelConfig,
        origin: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """MeasurementError where this is not the model that was measured: other dimensions, another repository, or,
        where its `files` and their SHA-256 are known, other weights.
        """
        for key, value in dimensions(config).items():
            if (there := getattr(self.model, key)) != value:
                self._refuse(f"its {key.replace('_', ' ')} is {there} and the model's {value}")
        theirs, ours = self.model.origin.get("repository"), (origin or {}).get("repository")
        if theirs and ours and theirs != ours:
            self._refuse(f"it is of {theirs} and the model is {ours}")
        if files is not None:
            for name, sha256 in sorted(self.model.files.items()):
                if name.endswith(".safetensors") and files.get(name) != sha256:
                    self._refuse(f"{name} is not the same file")

    def _refuse(self, why: str) -> None:
        raise MeasurementError(
            f"the measurement of {self.model.name} is of another model: {why}",
            hint="measure this one: mq-quant measure --source … -o FILE",
        )


def dimensions(config: ModelConfig) -> dict[str, int]:
    """The dimensions by which a measurement knows its model."""
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocabulary": config.vocab_size,
    }


def whole_name(gate_up: str, down: str) -> str:
    """What `whole` calls a model with these formats in all layers: one name where both are the same."""
    return gate_up if gate_up == down else f"{gate_up}/{down}"


def whole_formats(name: str) -> tuple[str, str]:
    """The formats of gate and up and of down that `whole_name` gave this name."""
    gate_up, _, down = name.partition("/")
    return gate_up, down or gate_up


def read_measurement(path: Path) -> Measurement:
    """The measurement in a file; MeasurementError where it is none, or not whole."""
    try:
        with open_plain(path) as f:
            raw = f.read(LIMIT + 1)
    except OSError as e:
        raise MeasurementError(f"cannot be read: {e.strerror}", file=path, hint=HINT) from None
    if len(raw) > LIMIT:
        raise MeasurementError(f"is larger than {LIMIT} bytes, so it is no measurement", file=path, hint=HINT)
    try:
        document = parse_object(raw)
        if document.get("kind") == KIND and document.get("version") != VERSION:
            raise JsonError(f"has version {document.get('version')}, and this program reads {VERSION}")
        return Measurement.model_validate(document)
    except JsonError as e:
        raise MeasurementError(f"is no measurement: {e}", file=path, hint=HINT) from None
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise MeasurementError(
            f"is no measurement: {where + ': ' if where else ''}{said}", file=path, hint=HINT
        ) from None
