"""Tuning inside a build: the units of a layer are held back until all of them are encoded, then the layer is tuned, and
its units are handed on as they will stay.

The file's own residual stream is kept beside the output between layers, with its hash in the journal. Where it is
missing, it is made again by running the layers that stand in the file already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import ResumeError
from ...formats.hfq.stored import StoredForm
from ...formats.watch import UNWATCHED, Watch
from ...verify.model.reference import embed
from ..calibrate.layer_pass import EMBED
from ..calibrate.on_the_fly import GatheredImportance
from ..spec.plan import PlannedTensor
from ..tune.layer import LayerTask, TuneSettings, run_layer, tune_layer
from ..tune.student import StoredTensor
from ..write.journal import Record
from ..write.partial_file import PartialFile
from ..write.stream_folder import StreamFolder
from .build_spec import BuildSpec
from .encoding import Encoded
from .work_units import WorkUnit

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Held = list[tuple[WorkUnit, Encoded]]
OWN = "own"
"""The name of the file's own stream in its folder."""


class TunedLayers:
    """The layers of one build on their way from the encoder to the file."""

    def __init__(
        self,
        spec: BuildSpec,
        settings: TuneSettings,
        gathered: GatheredImportance,
        file: PartialFile,
        streams: StreamFolder,
        todo: Sequence[WorkUnit],
        watch: Watch = UNWATCHED,
    ) -> None:
        """`todo` are the units that will be encoded: whole layers, in order. `watch` hears what is done to a layer."""
        self._spec, self._settings, self._gathered, self._file = spec, settings, gathered, file
        self._streams = streams
        self._missing = Counter(unit.layer for unit in todo)
        self._held: Held = []
        self._watch = watch

    def add(self, unit: WorkUnit, done: Encoded) -> Held:
        """Take an encoded unit; returns those that are to be written now, in order."""
        if unit.layer is None:
            return [(unit, done)]
        self._held.append((unit, done))
        self._watch.advance(0, unit.key)
        self._missing[unit.layer] -= 1
        if self._missing[unit.layer]:
            return []
        held, self._held = self._held, []
        return self._tuned(unit.layer, held)

    def _tuned(self, layer: int, held: Held) -> Held:
        """The units of a whole layer after tuning; the stream behind the layer is durable when this returns."""
        self._watch.advance(0, f"tuning layer {layer}")
        stored = {name: tensor for unit, done in held for name, tensor in tensors_of(unit, done.payload)}
        source = {unit.tensors[0].name: done.weights for unit, done in held if done.weights is not None}
        task = LayerTask(
            config=self._spec.plan.config,
            layer=layer,
            stored=stored,
            source=source,
            entering=self._entering(layer),
            target=self._gathered.target(layer),
            costs=self._gathered.costs(layer),
        )
        result = tune_layer(
            task, self._settings, self._gathered.devices, np.empty(self._gathered.shape, np.float32)
        )
        sha256 = self._streams.save(OWN, layer + 1, result.leaving)
        out: Held = []
        for unit, done in held:
            payload = np.concatenate([result.payloads.get(t.name, _of(t, unit, done)) for t in unit.tensors])
            report = {**done.report, "tuning": result.record()} if done.report else None
            out.append((unit, replace(done, payload=payload, report=report, weights=None)))
        last, done = out[-1]
        out[-1] = last, replace(done, stream={"layer": layer, "sha256": sha256})
        return out

    def _entering(self, layer: int) -> F32:
        """The file's own stream before a layer: as it was kept, or made again from what stands in the file."""
        if layer == 0:
            return self._embedded()
        self._streams.drop(OWN, layer - 1)  # its layer is in the file and synced
        with suppress(ResumeError):
            return self._streams.mapped(OWN, layer, self._gathered.shape, self._stream_sha256(layer - 1))
        stream = self._embedded()
        for earlier in range(layer):
            stored = dict(self._in_file(earlier))
            task = LayerTask(self._spec.plan.config, earlier, stored, {}, stream, stream)
            stream = run_layer(task, self._settings, self._gathered.devices)
        return stream

    def _embedded(self) -> F32:
        """The tokens' rows of the embedding, which stands in the file before the first layer."""
        rows = RowsInFile(self._file, next(t for t in self._spec.plan.tensors if t.name == EMBED))
        return embed(rows, self._gathered.tokens).numpy()

    def _stream_sha256(self, layer: int) -> str | None:
        """What the journal says of the file's stream behind a layer."""
        return next(
            (done["stream"]["sha256"] for done in self._file.done.values() if _ends(done, layer)), None
        )

    def _in_file(self, layer: int) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors of a layer that is complete in the file."""
        for t in self._spec.plan.tensors:
            if t.layer == layer:
                data = np.frombuffer(self._file.read(t.start, t.nbytes), np.uint8)
                yield t.name, StoredTensor(t.format, t.shape, data)


def tensors_of(unit: WorkUnit, payload: U8) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of an encoded unit by name."""
    for t in unit.tensors:
        at = t.start - unit.start
        yield t.name, StoredTensor(t.format, t.shape, payload[at : at + t.nbytes])


def _ends(done: Record, layer: int) -> bool:
    """Whether a layer is complete with the unit that this journal line is of."""
    return bool(done.get("stream", {}).get("layer") == layer)


def _of(tensor: PlannedTensor, unit: WorkUnit, done: Encoded) -> U8:
    at = tensor.start - unit.start
    return done.payload[at : at + tensor.nbytes]


class RowsInFile:
    """A matrix that stands complete in the unfinished file, row by row as its readers decode it."""

    def __init__(self, file: PartialFile, tensor: PlannedTensor) -> None:
        self._file, self._tensor = file, tensor
        self._row_bytes = tensor.nbytes // tensor.shape[0]

    def weight(self, name: str) -> F32:
        """The whole matrix f32."""
        return self.rows(name, 0, self._tensor.shape[0])

    def rows(self, name: str, low: int, high: int) -> F32:
        """Rows [low, high) f32."""
        t, size = self._tensor, self._row_bytes
        data = np.frombuffer(self._file.read(t.start + low * size, (high - low) * size), np.uint8)
        return StoredForm(t.format).decode(data, (high - low, *t.shape[1:]))
