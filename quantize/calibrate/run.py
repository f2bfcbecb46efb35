"""Calibration: the source runs on tokens, layer by layer, and each layer's second moments are written as it is done.

All tokens pass through one layer before the next is read, so that a streamed checkpoint is read once and memory holds
the activations of one layer. Depends on gather, calibration_folder, requantised, progress and formats.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...formats.checkpoint.source import Source
from ...formats.machine import peak_rss
from ...formats.minimax import TensorSpec, layer_inventory
from ...formats.statistics.moment_file import DownForm
from ..cli.progress_bar import Progress
from ..spec.estimates import calibration_sizes
from ..spec.provenance import flatten
from ..spec.recipe import Recipe
from .folder import CalibrationFolder
from .layer_pass import EMBED, enter, gather_layer, manifest_of, open_device
from .stored_model import StoredModelWeights
from .tokens import Tokens


@dataclass(frozen=True)
class CalibrationOptions:
    """How a calibration runs. `down`, `propagate` and, in the last bits, `device` decide its bytes; the rest does not.

    With a recipe in `propagate` each layer sees what the layers before it put out as that recipe stores them.
    """

    down: DownForm = "compact"
    propagate: Recipe | None = None
    device: str = "cpu"
    jobs: int = 1
    force: bool = False
    restart: bool = False
    quiet: bool = False


@dataclass
class Reading:
    """The source seen from one layer: counts what is read, and where it is read `once` releases it thereafter."""

    source: Source
    progress: Progress
    layer: int
    once: bool
    read: int = 0
    released: set[str] = field(default_factory=set)

    def weight(self, name: str) -> NDArray[np.float32]:
        values = self.source.weight(name)
        self.read += values.size
        self.progress.advance(values.size, f"layer {self.layer}")
        if self.once:
            self.source.release(name)
            self.released.add(name)
        return values

    def finish(self, specs: list[TensorSpec]) -> None:
        """Release what is left of the layer: experts that no token chose, or all of it."""
        for spec in specs:
            if spec.name not in self.released:
                self.source.release(spec.name)
        self.progress.advance(weights_of(specs) - self.read, f"layer {self.layer}")


def weights_of(specs: list[TensorSpec]) -> int:
    return sum(int(np.prod(spec.shape)) for spec in specs)


def calibrate(source: Source, tokens: Tokens, folder: Path, options: CalibrationOptions) -> dict[str, Any]:
    """Gather the second moments of every layer into `folder`, or continue there; returns what `--json` prints.

    Raises OutputError, ResumeError or CalibrationError before any work where the folder or the tokens cannot be used.
    """
    began = time.monotonic()
    config, device = source.config, open_device(options.device)
    made_from = {"origin": source.origin, "files": source.fingerprint()}
    propagate = options.propagate.resolved() if options.propagate else "source"
    manifest = manifest_of(config, made_from, tokens, options.down, options.device, propagate)
    sizes = calibration_sizes(config, tokens.size, options.down)
    needed = sizes.folder_bytes + 2 * sizes.unfinished_bytes + source.disk_bytes()
    with CalibrationFolder(folder, dict(flatten(manifest)), options.force, options.restart) as out:
        out.check_space(needed)
        records = out.done()
        resumed = len(records)
        _run(source, tokens, out, options, records, device)
        out.complete(config, manifest, records)
    seen = sum(config.num_local_experts - len(r["unseen"]) for r in records)
    return {
        "path": str(folder),
        "layers": len(records),
        "resumed_layers": resumed,
        "tokens": int(tokens.size),
        "coverage": seen / (config.num_local_experts * len(records)),
        "notes": [note for record in records for note in record["notes"]],
        "folder_bytes": sum(f.stat().st_size for f in folder.iterdir()),
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss_bytes": peak_rss(),
        "estimate": {key: value for key, value in sizes.as_json().items() if key != "tokens"},
    }


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
    total = sum(map(weights_of, layers.values()))
    before = sum(weights_of(layers[n]) for n in range(first))
    with Progress(f"calibrate {out.path.name}", total, before, options.quiet) as progress:
        for layer in range(first, config.num_hidden_layers):
            reading = Reading(source, progress, layer, once=stored is None)
            finish = partial(reading.finish, layers[layer])
            hidden = gather_layer(reading, config, layer, hidden, out, options.down, stored, finish)
            records.append(out.record(layer))
