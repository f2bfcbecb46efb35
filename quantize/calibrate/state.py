"""A calibration state: the source's streams between layers, made ahead so that parts run no layer before their own.

One machine runs the model once and keeps the streams that enter some layers, with what the journal of a calibration
says of every layer. A build that begins at such a layer continues from there, as an interrupted one would, so its bytes
and what it says of its calibration are those of a build that ran all layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...formats.checkpoint.source import Source
from ...formats.errors import CalibrationError
from ...formats.machine import peak_rss
from ...formats.minimax import ModelConfig, layer_inventory
from ...formats.own_file import disk_errors
from ...formats.statistics.moment_file import layer_file
from ...formats.strictjson import JsonError, parse_object
from ...formats.unchanged import UnchangedFile
from ...formats.watch import UNWATCHED, Watch
from ..spec.calibration_sizes import calibration_sizes, sensitivity_sizes
from ..spec.provenance import code, flatten
from ..write.atomic import write_atomic
from ..write.journal import differences
from .folder import STATE, CalibrationFolder, check_folder, hidden_file
from .layer_pass import EMBED, enter, gather_layer, layer_weights, manifest_of, open_device, with_others
from .run import Reading, weights_of
from .sensitivity import JOURNAL as SENSITIVITY_JOURNAL
from .sensitivity import find_sensitivities
from .sensitivity_files import damaged_file, sensitivity_record
from .source_layers import DOWN
from .tokens import Tokens

LIMIT = 64 << 20
DEPTH = 16
_PLACE = "source.origin."
"""Keys of a manifest that may differ: where each machine had the source."""


@dataclass(frozen=True)
class StateOptions:
    """How a state is made, with the streams that enter these `layers`, and with what errors behind each layer cost."""

    layers: Collection[int]
    device: str = "cpu"
    force: bool = False
    restart: bool = False
    sensitivity: bool = True
    watch: Watch = UNWATCHED


@dataclass(frozen=True)
class StateResult:
    """A finished state; `resumed_layers` are those of an earlier run."""

    path: Path
    layers: int
    resumed_layers: int
    tokens: int
    streams: tuple[int, ...]
    folder_bytes: int
    seconds: float
    peak_rss_bytes: int

    def as_json(self) -> dict[str, Any]:
        """What `calibrate --streams --json` prints."""
        return {**asdict(self), "path": str(self.path), "streams": list(self.streams)}


def equal_parts(layers: int, parts: int) -> tuple[int, ...]:
    """The first layers of so many equal parts of a model, as `build --part` cuts it."""
    return tuple(layers * n // parts for n in range(parts))


def make_state(source: Source, tokens: Tokens, path: Path, options: StateOptions) -> StateResult:
    """Run the source on tokens and keep the streams that enter `options.layers`, or continue that.

    Raises InUseError, OutputError, ResumeError or CalibrationError before any work where the folder or the tokens
    cannot be used.
    """
    began, config = time.monotonic(), source.config
    check_folder(path, options.force, options.restart)
    device = open_device(options.device)
    made_from = {"origin": source.origin, "files": source.fingerprint(options.watch)}
    sensitivity = sensitivity_record(tokens) if options.sensitivity else {}
    made = {**manifest_of(config, made_from, tokens, DOWN, device), **sensitivity, "code": code()}
    kept = sorted(set(options.layers) - {0})
    with CalibrationFolder(
        path, dict(flatten({**made, "streams": kept})), options.force, options.restart
    ) as out:
        needed = _disk_bytes(config, tokens.size, len(kept), options.sensitivity)
        out.check_space(needed + source.disk_bytes())
        hashes: dict[int, str] = {}
        if options.sensitivity:
            signature = dict(flatten(made))
            hashes = find_sensitivities(source, tokens, device, path, signature, options.watch)
        count, first = config.num_hidden_layers, len(out.journal.done)
        layers = {n: list(layer_inventory(config, n)) for n in range(count)}
        names = [spec.name for n in range(first, count) for spec in layers[n]]
        source.schedule(names if first else [EMBED, *names])
        total, done = (sum(weights_of(layers[n]) for n in range(stop)) for stop in (count, first))
        options.watch.begin("running the source", total, "weights", done)
        hidden = enter(source, config, out, tokens, first).to(device) if first < count else None
        for layer in range(first, count):
            assert hidden is not None
            reading = Reading(source, options.watch, layer, once=True)
            with layer_weights(reading, with_others(device), layer) as weights:
                after, keeps = partial(reading.finish, layers[layer]), layer in kept
                gathered = gather_layer(
                    weights, config, layer, hidden, out, DOWN, after=after, keep_entering=keeps
                )
            gathered.finish()
            hidden = gathered.behind
        with disk_errors(path):
            for n in range(count):
                (path / layer_file(n)).unlink(missing_ok=True)
        records = [out.record(n) for n in range(count)]
        document = {**made, "layers": records, "streams": kept, "sensitivities": list(hashes.values())}
        text = json.dumps(document, indent=1, ensure_ascii=False).encode()
        write_atomic(path / STATE, [memoryview(text)])
        out.journal.remove()
        with disk_errors(path):
            (path / SENSITIVITY_JOURNAL).unlink(missing_ok=True)
    return StateResult(
        path=path,
        layers=count,
        resumed_layers=first,
        tokens=int(tokens.size),
        streams=tuple(kept),
        folder_bytes=sum(file.stat().st_size for file in path.iterdir()),
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss(),
    )


def _disk_bytes(config: ModelConfig, tokens: int, streams: int, sensitive: bool) -> int:
    sizes = calibration_sizes(config, tokens, DOWN)
    needed = sizes.folder_bytes + (streams + 2) * sizes.unfinished_bytes
    if not sensitive:
        return needed
    _, meanwhile, stays = sensitivity_sizes(config, tokens)
    return max(meanwhile, needed + stays)


class _State(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    layers: list[dict[str, Any]] = Field(min_length=1)
    streams: list[int]
    sensitivities: list[str] = []


@dataclass(frozen=True)
class CalibrationState:
    """A finished state in a folder: what it was made from, the record of each layer, the layers that streams enter, and
    the hashes of layers' sensitivities, where it has them.
    """

    path: Path
    made: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    streams: tuple[int, ...]
    sensitivities: Mapping[int, str]

    @classmethod
    def open(cls, path: Path) -> CalibrationState:
        """Raises CalibrationError where the folder holds no finished state."""
        again = "make it again with `mq-quant calibrate --streams`"
        file = path / STATE
        if not file.is_file():
            raise CalibrationError("holds no finished calibration state", file=path, hint=again)
        try:
            document = parse_object(UnchangedFile(file, CalibrationError).content(LIMIT), DEPTH)
            found = _State.model_validate(document)
            if any(not isinstance(record.get("sha256"), str) for record in found.layers):
                raise ValueError("a layer has no hash")
            if len(found.sensitivities) not in (0, len(found.layers)):
                raise ValueError("not every layer has a sensitivity")
        except (JsonError, ValidationError, ValueError) as e:
            raise CalibrationError(
                f"cannot be read: {str(e).splitlines()[0]}", file=file, hint=again
            ) from None
        listed = ("layers", "streams", "sensitivities")
        made = {key: value for key, value in document.items() if key not in listed}
        costs = dict(enumerate(found.sensitivities))
        return cls(path, made, tuple(found.layers), tuple(found.streams), costs)

    @property
    def sensitive(self) -> bool:
        """Whether it has what errors behind each layer cost."""
        return bool(self.sensitivities)

    def sensitivities_of(self, layers: Collection[int]) -> dict[int, str]:
        """The hashes of these layers' sensitivities; CalibrationError where a file is gone or damaged."""
        hashes = {layer: self.sensitivities[layer] for layer in layers}
        if damaged := damaged_file(self.path, hashes):
            raise CalibrationError(
                "is not the sensitivity that was written there",
                file=damaged,
                hint="copy the state here again",
            )
        return hashes

    def check(self, manifest: Mapping[str, Any]) -> None:
        """CalibrationError where a build with this manifest would gather something else."""
        mine, here = (
            {key: value for key, value in flatten(each) if not key.startswith(_PLACE)}
            for each in (self.made, {**manifest, "code": code()})
        )
        if different := differences(mine, here):
            raise CalibrationError(
                "is of another calibration:" + "".join(f"\n    {line}" for line in different),
                file=self.path / STATE,
                hint="give the same source, text and device, or leave --calibration-state out",
            )

    def start(self, layer: int) -> int:
        """The layer up to `layer` at which work can begin; behind the last layer nothing is left to do."""
        if layer >= len(self.records):
            return len(self.records)
        return max((n for n in self.streams if n <= layer), default=0)

    def prime(self, out: CalibrationFolder, layer: int) -> None:
        """Have a fresh folder stand as if all layers before `layer` were through; CalibrationError where the stream
        that enters it is gone or damaged.
        """
        if layer < len(self.records):
            self._copy_stream(out, layer)
        for n, record in enumerate(self.records[:layer]):
            rest = {key: value for key, value in record.items() if key not in ("unit", "xxh64")}
            out.journal.record(f"layer.{n}", str(record["sha256"]), **rest)

    def _copy_stream(self, out: CalibrationFolder, layer: int) -> None:
        path = self.path / hidden_file(layer)
        stream = np.fromfile(path, np.uint8) if path.is_file() else None
        written = None if stream is None else write_atomic(out.path / path.name, [stream.data])
        if written is None or written.sha256 != self.records[layer - 1].get("hidden"):
            with suppress(OSError):
                (out.path / path.name).unlink()
            raise CalibrationError(
                "is not the stream that was written there", file=path, hint="copy the state here again"
            )
