"""An evaluation: many files in one pass over one source, or beside its saved predictions.

The result is one JSON document. Until it stands, the streams between layers and a journal lie in a folder beside it,
and the same command continues after the last layer that all models have passed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...formats.errors import InputError
from ...formats.hfq import HfqFile
from ...formats.hfq.checked import CheckedFile
from ...formats.hfq.provenance import Provenance, stated_quantization_hash
from ...formats.hfq.stored import config_of
from ...formats.machine import peak_rss
from ...formats.strictjson import compact
from ...formats.unchanged import UnchangedFile
from ...formats.watch import UNWATCHED, Watch
from ...verify.evaluate.dense import DenseComparison, of_source
from ...verify.evaluate.head import Head, judge
from ...verify.evaluate.saved_reference import encode_reference
from ...verify.model.hfq_weights import DecodedFile
from ...verify.model.layer_model import TorchModel
from ...verify.model.metrics import FEWEST, LayerFigures, Positions
from ..calibrate.layer_pass import device_record, open_device
from ..spec.provenance import code, flatten, program
from ..write.atomic import write_atomic, write_result
from ..write.journal import EVALUATION
from ..write.layer_streams import layer_streams
from ..write.partial_file import beside
from .checks import check_models, check_outputs
from .layers import SOURCE, LayersRun, Models, SourceModel, file_name
from .reference import Reference
from .result import EvaluatedFile, Evaluation

WORK = ".partial.evaluation"
RESTART = "give --restart to begin the evaluation anew"


@dataclass(frozen=True)
class EvaluateOptions:
    """`device` decides the last bits of the figures, the rest does not. `watch` hears of the work."""

    output: Path
    save_reference: Path | None = None
    device: str = "cpu"
    force: bool = False
    restart: bool = False
    watch: Watch = UNWATCHED


def evaluate_files(paths: Sequence[Path], reference: Reference, options: EvaluateOptions) -> Evaluation:
    """Judge files against a reference and write what was found to `options.output`.

    Raises InputError or HfqError where a file is of another model, OutputError where an output cannot be written,
    ResumeError where an unfinished evaluation there is another one; all of them before any work. HfqError comes later
    where a payload is damaged, when it is read.
    """
    began, device = time.monotonic(), open_device(options.device)
    with ExitStack() as stack:
        files = [stack.enter_context(CheckedFile(path)) for path in paths]
        config = config_of(files[0])
        check_models(files, reference)
        check_outputs(options.output, options.save_reference, reference, config, len(files), options.force)
        unchanged = [UnchangedFile(path, InputError) for path in paths]
        source = SourceModel(reference.source, device, options.watch) if reference.source else None
        models = Models(config, source, [TorchModel(DecodedFile(file), config, device) for file in files])
        signature = {
            **reference.signature(),
            **device_record(device),
            "code": code(),
            "files": [_identity(file) for file in files],
        }
        work, shape = beside(options.output, WORK), (*reference.tokens.shape, config.hidden_size)
        streams = stack.enter_context(
            layer_streams(work, shape, EVALUATION, dict(flatten(signature)), options.restart, RESTART)
        )
        layers = LayersRun(models, reference.tokens, streams, options.watch)
        resumed = layers.run()
        found = _heads(layers, reference, options)
        for file in unchanged:
            file.check()
        result = Evaluation(
            program=program(),
            source=reference.origin(),
            reference=reference.kind,
            tokens=reference.tokens_record(),
            files=tuple(
                _evaluated(f, p, layers.figures(i)) for i, (f, p) in enumerate(zip(files, found, strict=True))
            ),
            notes=tuple(
                dict.fromkeys(n for f, p in zip(files, found, strict=True) for n in _notes(f, p, reference))
            ),
            resumed_layers=resumed,
            seconds=round(time.monotonic() - began, 3),
            peak_rss_bytes=peak_rss(),
        )
        write_atomic(options.output, [memoryview(compact(result.as_json()) + b"\n")])
        streams.finish()
    return result


def _heads(layers: LayersRun, reference: Reference, options: EvaluateOptions) -> list[Positions]:
    """What was found of each file at the head; saves the source's predictions where that is asked for."""
    heads = layers.heads()
    tests = [heads[file_name(i)] for i in range(len(layers.models.files))]
    if SOURCE not in heads:
        return judge(reference.comparison(len(tests)), tests, options.watch)
    source, vocabulary = heads[SOURCE], layers.models.config.vocab_size
    comparison = of_source(source, reference.tokens, vocabulary, len(tests))
    found = judge(comparison, tests, options.watch)
    if options.save_reference is not None:
        _save(options.save_reference, source, comparison, reference)
    return found


def _save(path: Path, source: Head, comparison: DenseComparison, reference: Reference) -> None:
    record = {**reference.record, "text": reference.text, "program": program()}
    write_result(
        path, encode_reference(source, comparison.totals, reference.tokens, comparison.vocabulary, record)
    )


def _identity(file: HfqFile) -> dict[str, Any]:
    """What tells a file from others: its name, its size, and the hashes that it states of its payloads and metadata."""
    made = Provenance.of(file)
    stated = stated_quantization_hash(file.metadata) or UnchangedFile(file.path, InputError).sha256()
    size = file.path.stat().st_size
    return {"name": file.path.name, "bytes": size, "hash": stated, "metadata": made.metadata_checksum}


def _evaluated(file: HfqFile, found: Positions, layers: tuple[LayerFigures, ...]) -> EvaluatedFile:
    made = Provenance.of(file)
    return EvaluatedFile(
        name=file.path.name,
        tier=made.recipe.tier if made.recipe else None,
        bytes=file.path.stat().st_size,
        quantization_hash=stated_quantization_hash(file.metadata),
        calibration_tokens=made.calibration_tokens,
        divergence=found.summary(),
        layers=layers,
    )


def _notes(file: HfqFile, found: Positions, reference: Reference) -> list[str]:
    """What should be known of one file's figures."""
    notes, name = [], file.path.name
    if not np.isfinite(found.kld).all():
        notes.append(f"{name}: its predictions are not numbers everywhere; the file is broken")
    stated = Provenance.of(file).source
    theirs, ours = reference.source_files(), stated.files if stated else {}
    differs = [part for part, sha256 in ours.items() if theirs.get(part, sha256) != sha256]
    if differs:
        notes.append(f"{name}: was made from another source than the reference, {differs[0]} is not the same")
    if len(found.kld) < FEWEST:
        notes.append(f"judged by {len(found.kld)} positions only; at least {FEWEST} make a mean firm")
    return notes
