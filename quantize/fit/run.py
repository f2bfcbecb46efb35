"""A measurement: each piece of a model is rounded alone, and what that does to its predictions is written down.

The source is read once, layer by layer. Until the result stands, streams, a journal and the calibration of the layer in
work lie in folders beside it, and the same command continues after the last finished layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...awq.importance import ModelImportance
from ...formats.checkpoint.source import Source
from ...formats.machine import peak_rss
from ...formats.minimax import layer_inventory
from ...formats.watch import UNWATCHED, Watch
from ..calibrate.folder import discard_folder
from ..calibrate.layer_pass import EMBED, device_record, make_room, open_device
from ..calibrate.on_the_fly import GatheredImportance
from ..calibrate.tokens import token_record
from ..encode.blas import one_blas_thread
from ..encode.encoders import CPU, Encoder
from ..encode.prepared_layer import fit_settings
from ..evaluate.layers import END
from ..pipeline.statistics import OnTheFly, Statistics, check_pin, effort_of, find, imatrix_path, open_imatrix
from ..spec.provenance import code, flatten, program
from ..spec.recipe import Recipe
from ..write.atomic import write_atomic
from ..write.journal import MEASUREMENT
from ..write.layer_streams import LayerStreams, layer_streams
from ..write.outputs import check_output, check_work_fits
from ..write.partial_file import CALIBRATION, beside
from .before import WHOLES, Texts, cost_of
from .found import Found, measurement_of
from .heads import divergences
from .measurement import EXPERT_NAMES, Measurement
from .pieces import LayerPieces
from .pieces_on_device import DevicePieces
from .rest import RestWeights
from .streams import Streams, StreamsRun, weights_of_expert

TIER = "mq4"
"""The tier whose way of rounding, and of storing all but experts, is taken: in these all tiers are alike."""
WORK = ".partial.measurement"
RESTART = "give --restart to begin the measurement anew"


@dataclass(frozen=True)
class MeasureOptions:
    """`device` decides the last bits of the result, the rest does not. `watch` hears of the work."""

    output: Path
    device: str = "cpu"
    jobs: int = 1
    encoder: Encoder = CPU
    force: bool = False
    restart: bool = False
    watch: Watch = UNWATCHED


@dataclass(frozen=True)
class MeasureResult:
    """A finished measurement; `seconds` and memory are of the last run, which may have continued an earlier one."""

    path: Path
    measurement: Measurement
    resumed_layers: int
    seconds: float
    peak_rss_bytes: int

    def as_json(self) -> dict[str, Any]:
        """What `measure --json` prints."""
        return {
            "path": str(self.path),
            **self.measurement.model_dump(mode="json"),
            "resumed_layers": self.resumed_layers,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def measure(
    recipe: Recipe, source: Source, texts: Texts, statistics: Statistics | None, options: MeasureOptions
) -> MeasureResult:
    """Measure every piece of a source that is open and validated, and write the result to `options.output`.

    Of the recipe only what is no format of experts matters: how matrices are rounded, and what else a file holds.
    Raises OutputError, ImatrixError, CalibrationError or ResumeError before any work where something cannot be used.
    """
    layers = source.config.num_hidden_layers
    plan = Streams(source.config, EXPERT_NAMES, tuple((choice,) * layers for choice in WHOLES))
    with losses_of(recipe, source, texts, statistics, plan, options) as found:
        measured = measurement_of(
            found, plan, source, recipe.model.name, texts.judging, effort_of(statistics)
        )
        write_atomic(options.output, [memoryview(measured.text_json().encode())])
    return MeasureResult(options.output, measured, found.resumed_layers, found.seconds, peak_rss())


@contextmanager
def losses_of(
    recipe: Recipe,
    source: Source,
    texts: Texts,
    statistics: Statistics | None,
    plan: Streams,
    options: MeasureOptions,
) -> Iterator[Found]:
    """Run all streams of a plan and compare them with the source's. Raises as `measure`.

    What an interrupted run left beside the output is let go once the block has done its work with what was found.
    """
    began, device, config = time.monotonic(), open_device(options.device), source.config
    needed = cost_of(source, texts, statistics, options.jobs).disk_bytes + source.disk_bytes()
    check_output(options.output, options.force)
    check_work_fits(options.output, needed, "--held-out")
    imatrix = open_imatrix(imatrix_path(recipe, statistics), config)
    check_pin(recipe, statistics, imatrix)
    files = source.fingerprint(options.watch)
    made_from = {"origin": source.origin, "files": files}
    gathered = None
    if isinstance(statistics, OnTheFly):
        gathered = GatheredImportance(
            source,
            texts.calibrating,
            options.device,
            texts.text,
            ahead=False,
            sensitive=statistics.sensitive(source),
        )
    found = find(statistics, imatrix, config, made_from, gathered)
    assert found.model is not None
    signature = {
        "program": program()["version"],
        "code": code(),
        "recipe": recipe.resolved(),
        "source": {name: file["sha256"] for name, file in files.items()},
        "tokens": token_record(texts.judging),
        "wholes": [[list(choice) for choice in whole] for whole in plan.wholes],
        **device_record(device),
        **found.signature,
    }
    shape = (*texts.judging.shape, config.hidden_size)
    with (
        _work(options, shape, dict(flatten(signature))) as streams,
        _gathering(gathered, beside(options.output, CALIBRATION), options.watch),
    ):
        rest = RestWeights(source, recipe)
        run = StreamsRun(source, rest, plan, texts.judging, device, streams, options.watch)
        resumed = streams.done
        with one_blas_thread():
            _layers(run, recipe, found.model, gathered, options)
        yield Found(divergences(run), files, found.stated, resumed, round(time.monotonic() - began, 3))
        streams.finish()


def _layers(
    run: StreamsRun,
    recipe: Recipe,
    importance: ModelImportance,
    gathered: GatheredImportance | None,
    options: MeasureOptions,
) -> None:
    """Take the streams through the layers that are left; each weight of the source is let go with its layer."""
    config, source, first = run.plan.config, run.source, run.streams.done
    each = config.num_local_experts * weights_of_expert(config)
    layers = {n: [spec.name for spec in layer_inventory(config, n)] for n in range(config.num_hidden_layers)}
    names = [name for n in range(first, config.num_hidden_layers) for name in layers[n]]
    source.schedule([*([] if first else [EMBED]), *names, *END])
    on_device = gathered is not None and gathered.stays and recipe.fit == "hessian"
    kind = DevicePieces if on_device else LayerPieces
    options.watch.begin("measuring", each * config.num_hidden_layers, "weights", each * first)
    for layer in range(first, config.num_hidden_layers):
        if gathered is not None:
            options.watch.advance(0, f"running layer {layer} of the source")
            gathered.begin_layer(layer)
            make_room(gathered.devices)
        choices, rounding = run.plan.choices(layer), fit_settings(recipe)
        pieces = kind(config, layer, importance.layer(layer), choices, rounding, source, options.encoder)
        run.pass_layer(layer, pieces, options.jobs)
        for name in [*([] if layer else [EMBED]), *layers[layer]]:
            source.release(name)


@contextmanager
def _work(
    options: MeasureOptions, shape: tuple[int, ...], signature: dict[str, Any]
) -> Iterator[LayerStreams]:
    """The streams beside the output; the folder of the calibration goes with theirs.

    What errors behind layers cost stays besides where no layer was measured yet: it is found before.
    """
    folder, moments = beside(options.output, WORK), beside(options.output, CALIBRATION)
    with layer_streams(folder, shape, MEASUREMENT, signature, options.restart, RESTART) as streams:
        if not streams.done:
            discard_folder(moments, but_sensitivities=not options.restart)
        ended = False
        try:
            yield streams
            ended = True
        finally:
            if not streams.done:
                discard_folder(moments, but_sensitivities=not ended)


@contextmanager
def _gathering(gathered: GatheredImportance | None, moments: Path, watch: Watch) -> Iterator[None]:
    """What gathers the calibration of the layer in work, in this folder."""
    if gathered is None:
        yield
        return
    gathered.open(moments, watch=watch)
    try:
        yield
    finally:
        gathered.close()
