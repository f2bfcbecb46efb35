"""All layers of a file, one after the other: the source's layer, the file's own, the training, and its payloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...formats.checkpoint.source import Source
from ...formats.hfq import HfqFile
from ...formats.hfq.stored import format_of
from ...formats.minimax import layer_inventory
from ...formats.watch import UNWATCHED, Watch
from ...verify.model.hfq_weights import DecodedFile
from ...verify.model.reference import embed
from ..calibrate.layer_pass import EMBED, layer_weights, run_source
from ..calibrate.run import Reading, weights_of
from ..calibrate.tokens import Tokens
from ..spec.hooks import nothing
from ..write.partial_file import PartialFile
from ..write.stream_folder import StreamFolder
from .laid import Piece, layer_names
from .layer import LayerTask, LayerTuning, TuneSettings, tune_layer
from .student import StoredTensor

U8 = NDArray[np.uint8]
LayerHook = Callable[[LayerTuning], None]


@dataclass(frozen=True)
class Streams:
    """What enters a layer, f32 [sequences, length, hidden] each: of the source, and of the file as it is stored."""

    source: NDArray[np.float32]
    own: NDArray[np.float32]


KINDS = tuple(field.name for field in fields(Streams))
RESTART = "give --restart to tune the file from its first layer"


@dataclass(frozen=True)
class LayersTuning:
    """A file, the source that it was made from, and what its layers are tuned on."""

    file: HfqFile
    source: Source
    tokens: Tokens
    settings: TuneSettings
    devices: Sequence[torch.device]

    def run(
        self,
        out: PartialFile,
        pieces: Sequence[Piece],
        kept: frozenset[str],
        streams: StreamFolder,
        watch: Watch = UNWATCHED,
        on_layer: LayerHook = nothing,
    ) -> tuple[list[Mapping[str, Any]], int]:
        """Put every piece that is not in `kept` into the new file; returns each layer's record, and how many layers an
        earlier run has done.
        """
        config = self.source.config
        for piece in pieces:
            if piece.layer is None and piece.key not in kept:
                out.put(piece, self._payload(piece, {}).data, {})
        of_layer = [[p for p in pieces if p.layer == n] for n in range(config.num_hidden_layers)]
        done = next((n for n, of in enumerate(of_layer) if any(p.key not in kept for p in of)), len(of_layer))
        specs = [list(layer_inventory(config, n)) for n in range(config.num_hidden_layers)]
        total, before = (sum(map(weights_of, part)) for part in (specs, specs[:done]))
        watch.begin("tuning", total, "weights", before)
        names = [spec.name for of in specs[done:] for spec in of]
        entering: Streams | None = None
        for n in range(done, len(of_layer)):
            if entering is None:
                self.source.schedule(names if n else [EMBED, *names])
                entering = self._enter(streams, n, out.done[of_layer[n - 1][-1].key] if n else {})
            target, tuning = self._layer(n, entering)
            entering = Streams(target, tuning.leaving)
            last = n + 1 == len(of_layer)
            hashes = {} if last else {k: streams.save(k, n + 1, getattr(entering, k)) for k in KINDS}
            for piece in of_layer[n]:
                out.put(
                    piece, self._payload(piece, tuning.payloads).data, {"tuning": tuning.record(), **hashes}
                )
            for kind in KINDS:
                streams.drop(kind, n)
            watch.advance(weights_of(specs[n]), f"layer {n}")
            on_layer(tuning)
        return [out.done[of[-1].key]["tuning"] for of in of_layer], done

    def _enter(self, streams: StreamFolder, layer: int, record: Mapping[str, Any]) -> Streams:
        """What enters a layer: both models' embeddings, or what was saved."""
        if layer:
            shape = (*self.tokens.shape, self.source.config.hidden_size)
            return Streams(**{kind: streams.load(kind, layer, shape, record.get(kind)) for kind in KINDS})
        embedded = Streams(*(embed(w, self.tokens).numpy() for w in (self.source, DecodedFile(self.file))))
        self.source.release(EMBED)
        return embedded

    def _layer(self, layer: int, entering: Streams) -> tuple[NDArray[np.float32], LayerTuning]:
        """The source's stream behind a layer, and what came of its tuning."""
        config, specs = self.source.config, list(layer_inventory(self.source.config, layer))
        reading = Reading(self.source, UNWATCHED, layer, once=False)
        with torch.inference_mode(), layer_weights(reading, self.devices, layer) as weights:
            hidden = torch.from_numpy(entering.source).to(self.devices[0])
            target = run_source(weights, config, layer, hidden).cpu().numpy()
        matrices = {s.name: reading.weight(s.name) for s in specs if s.role == "attn"}
        reading.finish(specs)
        entries = [self.file.entry(name) for name in layer_names(config, layer) if name in self.file]
        stored = {
            e.name: StoredTensor(format_of(self.file, e), e.shape, self.file.read(e.name)) for e in entries
        }
        task = LayerTask(config, layer, stored, matrices, entering.own, target)
        return target, tune_layer(task, self.settings, self.devices)

    def _payload(self, piece: Piece, changed: Mapping[str, U8]) -> U8:
        """The bytes of a piece, with what changed in place of what the file holds."""
        data = np.empty(piece.nbytes, np.uint8)
        for tensor in piece.tensors:
            at, name = tensor.start - piece.start, tensor.entry.name
            data[at : at + tensor.nbytes] = changed[name] if name in changed else self.file.read(name)
        return data
