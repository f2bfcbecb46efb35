"""Calibration: the source runs on tokens, layer by layer, and each layer's second moments are written as it is done.

All tokens pass through one layer before the next is read, so that a streamed checkpoint is read once and memory holds
the activations of one layer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...formats.checkpoint.safetensors_file import TensorInfo
from ...formats.checkpoint.source import Source
from ...formats.machine import peak_rss
from ...formats.minimax import ModelConfig, TensorSpec, layer_inventory
from ...formats.statistics.moment_file import DownForm
from ...formats.watch import UNWATCHED, Watch
from ..spec.calibration_sizes import CalibrationSizes, calibration_sizes
from ..spec.provenance import code, flatten
from ..spec.recipe import Recipe
from .folder import CalibrationFolder, check_folder
from .layer_pass import EMBED, enter, gather_layer, layer_weights, manifest_of, open_device, with_others
from .stored_model import StoredModelWeights
from .tokens import Tokens


@dataclass(frozen=True)
class CalibrationOptions:
    """How a calibration runs. `down`, `propagate` and, in the last bits, `device` decide its bytes; the rest does not.

    With a recipe in `propagate` each layer sees what the layers before it put out as that recipe stores them.
    `watch` hears of the bytes that are hashed, and of the weights that are read.
    """

    down: DownForm = "compact"
    propagate: Recipe | None = None
    device: str = "cpu"
    jobs: int = 1
    force: bool = False
    restart: bool = False
    watch: Watch = UNWATCHED


@dataclass(frozen=True)
class CalibrationResult:
    """A finished calibration. `resumed_layers` are those of an earlier run; `estimate` is what was said before."""

    path: Path
    layers: int
    resumed_layers: int
    tokens: int
    coverage: float
    notes: tuple[str, ...]
    folder_bytes: int
    seconds: float
    peak_rss_bytes: int
    estimate: CalibrationSizes

    def as_json(self) -> dict[str, Any]:
        """What `calibrate --json` prints."""
        sizes = {key: value for key, value in self.estimate.as_json().items() if key != "tokens"}
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes), "estimate": sizes}


@dataclass
class Reading:
    """The source seen from one layer: counts what is read, and where it is read `once` releases it thereafter."""

    source: Source
    watch: Watch
    layer: int
    once: bool
    read: int = 0
    released: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def weight(self, name: str) -> NDArray[np.float32]:
        values = self.source.weight(name)
        self._took(name, values.size)
        return values

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def stored(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """As `Source.stored`, on any thread."""
        codes, scales = self.source.stored(name)
        self._took(name, codes.size)
        return codes, scales

    def _took(self, name: str, weights: int) -> None:
        with self._lock:
            self.read += weights
            self.watch.advance(weights, f"layer {self.layer}")
            if self.once:
                self.source.release(name)
                self.released.add(name)

    def finish(self, specs: list[TensorSpec]) -> None:
        """Release what is left of the layer: experts that no token chose, or all of it."""
        for spec in specs:
            if spec.name not in self.released:
                self.source.release(spec.name)
        self.watch.advance(weights_of(specs) - self.read, f"layer {self.layer}")


def weights_of(specs: list[TensorSpec]) -> int:
    return sum(int(np.prod(spec.shape)) for spec in specs)


def calibrate(source: Source, tokens: Tokens, folder: Path, options: CalibrationOptions) -> CalibrationResult:
    """Gather the second moments of every layer into `folder`, or continue there.

    Raises InUseError, OutputError, ResumeError or CalibrationError before any work where the folder or the tokens
    cannot be used.
    """
    began = time.monotonic()
    check_folder(folder, options.force, options.restart)
    config, device = source.config, open_device(options.device)
    made_from = {"origin": source.origin, "files": source.fingerprint(options.watch)}
    propagate = options.propagate.resolved() if options.propagate else "source"
    manifest = manifest_of(config, made_from, tokens, options.down, device, propagate)
    sizes = calibration_sizes(config, tokens.size, options.down)
    needed = sizes.folder_bytes + 2 * sizes.unfinished_bytes + source.disk_bytes()
    signature = dict(flatten({**manifest, "code": code()}))
    with CalibrationFolder(folder, signature, options.force, options.restart) as out:
        out.check_space(needed)
        records = out.done()
        resumed = len(records)
        _run(source, tokens, out, options, records, device)
        out.complete(config, manifest, records)
    seen = sum(config.num_local_experts - len(r["unseen"]) for r in records)
    return CalibrationResult(
        path=folder,
        layers=len(records),
        resumed_layers=resumed,
        tokens=int(tokens.size),
        coverage=seen / (config.num_local_experts * len(records)),
        notes=tuple(note for record in records for note in record["notes"]),
        folder_bytes=sum(f.stat().st_size for f in folder.iterdir()),
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss(),
        estimate=sizes,
    )


def _run(
    source: Source,
    tokens: Tokens,
    out: CalibrationFolder,
    options: CalibrationOptions,
    records: list[dict[str, Any]],
    device: torch.device,
) -> None:
    """Run the layers that `records` does not hold yet, and add theirs."""
    config, first = source.config, len(records)
    if first == config.num_hidden_layers:
        return
    layers = {n: list(layer_inventory(config, n)) for n in range(config.num_hidden_layers)}
    names = [spec.name for n in range(first, config.num_hidden_layers) for spec in layers[n]]
    source.schedule(names if first else [EMBED, *names])
    asked = options.propagate
    stored = StoredModelWeights(source, config, asked, options.jobs) if asked else None
    hidden = enter(stored or source, config, out, tokens, first).to(device)
    if not first:
        source.release(EMBED)
    total, done = (sum(weights_of(layers[n]) for n in range(stop)) for stop in (len(layers), first))
    options.watch.begin("gathering", total, "weights", done)
    for layer in range(first, config.num_hidden_layers):
        reading = Reading(source, options.watch, layer, once=stored is None)
        finish = partial(reading.finish, layers[layer])
        weights = (
            layer_weights(reading, with_others(device), layer) if stored is None else nullcontext(reading)
        )
        with weights as given:
            gathered = gather_layer(given, config, layer, hidden, out, options.down, stored, finish)
        gathered.finish()
        hidden = gathered.behind
        records.append(out.record(layer))
