"""A finished file is tuned: the source runs beside it, layer by layer, and a new file gets what came of each layer.

The file that is given stays as it is. The new one has the same tensors of the same sizes. It is written as a build
writes: under another name until it is complete, and continued after the last finished layer where it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...formats.checkpoint.source import Source
from ...formats.errors import TuningError
from ...formats.hfq import HfqFile, open_hfq
from ...formats.hfq.checked import payload_checks
from ...formats.hfq.provenance import Provenance, stated_quantization_hash
from ...formats.hfq.stored import config_of
from ...formats.machine import peak_rss
from ...formats.unchanged import UnchangedFile
from ...formats.watch import UNWATCHED, Watch
from ...verify.model.hfq_weights import check_shapes
from ..calibrate.layer_pass import device_record, open_device, with_others
from ..calibrate.tokens import Tokens, token_record
from ..spec.hooks import nothing
from ..spec.metadata import Outcome
from ..spec.provenance import code, flatten, program
from ..write.inputs import check_no_input
from ..write.partial_file import TUNING, Destination, PartialFile, beside
from ..write.stream_folder import StreamFolder
from .laid import TunedLayout
from .layer import PLAIN, LayerTuning, TuneSettings
from .layers import RESTART, LayersTuning


@dataclass(frozen=True)
class TuneOptions:
    """How a file is tuned. `settings` and `device` decide its bytes, the rest does not.

    `watch` hears of the work; `on_layer(tuning)` is called when a layer stands in the new file.
    """

    output: Path
    settings: TuneSettings = PLAIN
    device: str = "cpu"
    jobs: int = 1
    force: bool = False
    restart: bool = False
    watch: Watch = UNWATCHED
    on_layer: Callable[[LayerTuning], None] = nothing


@dataclass(frozen=True)
class TuneResult:
    """A tuned file. `layers` holds each layer's errors before and after, and whether the trained form was kept."""

    path: Path
    total_bytes: int
    quantization_hash: str
    tokens: int
    layers: tuple[Mapping[str, Any], ...]
    resumed_layers: int
    seconds: float
    peak_rss_bytes: int

    @property
    def kept_layers(self) -> int:
        """Layers whose trained form is in the file."""
        return sum(1 for layer in self.layers if layer["kept"])

    def as_json(self) -> dict[str, Any]:
        """What `tune --json` prints."""
        shown = {"path": str(self.path), "layers": list(self.layers), "kept_layers": self.kept_layers}
        return {**asdict(self), **shown}


def tune_file(path: Path, source: Source, tokens: Tokens, options: TuneOptions) -> TuneResult:
    """Tune every layer of a file on token ids i32 [sequences, length], into a new file.

    Raises HfqError, TuningError, BackendError, OutputError or ResumeError before any work where file, source, device or
    output cannot be used.
    """
    began, device = time.monotonic(), open_device(options.device)
    with open_hfq(path) as file:
        _check_model(file, source)
        check_no_input(options.output, [path])
        threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
        record = {
            "program": program(),
            "torch": torch.__version__,
            **device_record(device),
            **threads,
            "tokens": token_record(tokens),
            "settings": options.settings.record(),
            "of": stated_quantization_hash(file.metadata),
        }
        laid = TunedLayout.of(file, source.config, record)
        streams_bytes = 4 * int(tokens.size) * source.config.hidden_size * 4  # of two layers, in f32
        destination = Destination(options.output, options.force, streams_bytes + source.disk_bytes())
        destination.check(laid.total_bytes)
        destination.check_unused()
        fingerprint = _check_source(file, source, options.watch)
        given = UnchangedFile(path, TuningError)
        options.watch.begin("hashing the file", given.size, "bytes")
        signature = {
            **record,
            "code": code(),
            "file": given.sha256(options.watch, payload_checks(path)),
            "source": fingerprint,
        }
        with PartialFile(destination, laid, laid.pieces, dict(flatten(signature)), options.restart) as out:
            streams = StreamFolder(beside(destination.path, TUNING), out.begun_anew, RESTART)
            kept = out.take_over(laid.pieces, options.jobs, options.watch)
            work = LayersTuning(file, source, tokens, options.settings, with_others(device))
            records, resumed = work.run(out, laid.pieces, kept, streams, options.watch, options.on_layer)
            given.check()
            outcome = Outcome(
                out.hash.quantization_hash, out.hash.checksums, _reports(Provenance.of(file).layers, records)
            )
            final = out.commit(laid.header(outcome, file.arch_id))
            streams.discard()
    return TuneResult(
        path=final,
        total_bytes=laid.total_bytes,
        quantization_hash=outcome.quantization_hash,
        tokens=int(tokens.size),
        layers=tuple({"layer": n, **record} for n, record in enumerate(records)),
        resumed_layers=resumed,
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss(),
    )


def _check_model(file: HfqFile, source: Source) -> None:
    """TuningError or HfqError where a file is not of the source's model, on metadata alone."""
    config = config_of(file)
    theirs = source.config
    positions = theirs.max_position_embeddings
    if replace(config, block_shape=theirs.block_shape, max_position_embeddings=positions) != theirs:
        raise TuningError(
            "is of another model than the source: their configs have other dimensions",
            file=file.path,
            hint="check --source",
        )
    check_shapes(file, theirs)


def _check_source(file: HfqFile, source: Source, watch: Watch) -> dict[str, dict[str, Any]]:
    """The source's fingerprint; TuningError where the file says that it was made from other files."""
    fingerprint, stated = source.fingerprint(watch), Provenance.of(file).source
    for name, sha256 in stated.files.items() if stated else ():
        if fingerprint.get(name, {}).get("sha256") != sha256:
            raise TuningError(
                f"was made from another source: {name} is not the same",
                file=file.path,
                hint="check --source and its revision",
            )
    return fingerprint


def _reports(known: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is said of each layer: what the file said before, and how it was tuned."""
    before = {report.get("layer"): report for report in known}
    return [{"layer": n, **before.get(n, {}), "tuning": dict(record)} for n, record in enumerate(tuned)]
