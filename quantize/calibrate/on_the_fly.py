"""A calibration that a build gathers for itself: what a layer's experts see, just before the layer is encoded.

Besides the moments that all experts of the layer share, the rows are kept that they saw, so that each expert is rounded
under moments of its own. Both are dropped with the layer: between layers only the residual stream and the journal are
kept, beside the output. A layer whose moments are gone and needed again is gathered anew from the first layer.

On a GPU with room for two layers the source runs a layer ahead: while one is encoded, the next one is gathered. With
several GPUs it runs two ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...awq.from_imatrix import ImatrixModel
from ...awq.from_moments import calibration_record, coverage_of
from ...awq.importance import LayerWithRows
from ...awq.own_moments import with_rows
from ...formats.checkpoint.source import Source
from ...formats.errors import OutputError
from ...formats.minimax import ModelConfig
from ...formats.watch import UNWATCHED, Watch
from ..spec.calibration_sizes import inline_sizes
from ..spec.provenance import flatten
from .error_costs import ErrorCosts
from .folder import CalibrationFolder, discard_folder, manifest_text
from .layer_pass import (
    beside_others,
    device_record,
    layers_held,
    make_room,
    manifest_of,
    open_device,
    with_others,
)
from .resident import Resident, Residents, on_a_thread
from .sensitivity import find_sensitivities
from .sensitivity_files import sensitivity_record
from .source_layers import DOWN, SourceLayers
from .tokens import Tokens

if TYPE_CHECKING:
    from .state import CalibrationState


class GatheredImportance:
    """The importances of a model, gathered while it is built.

    Layers are begun in ascending order, all on one thread; `layer` may be called on any thread. Either each is begun
    when nothing needs the one before any more, or, where the next one is `under_way`, those before it are ended later.
    """

    def __init__(
        self,
        source: Source,
        tokens: Tokens,
        device: str = "cpu",
        text: str | None = None,
        keep_outputs: bool = False,
        stays: bool | None = None,
        state: CalibrationState | None = None,
        ahead: bool = True,
        sensitive: bool = False,
    ) -> None:
        """Raises BackendError where there is no such device. `bind` completes it.

        `text` is the sha256 of the text that travels with the package, where the tokens are of that. With
        `keep_outputs` the stream behind the last layer is kept too, so that every layer has a `target`. Where it
        `stays`, what the experts of a layer see is left on the device until the next layer is begun, and is not
        written: so it is on a GPU, unless said otherwise. Then the next layers are gathered meanwhile, as many as
        `layers_held` says, unless it may not run `ahead`. With a `state` no layer has to be run before the first one
        that is needed. Where it is `sensitive`, the source runs forward and back first, to find what errors behind each
        layer cost, and rows of down answer each other; a state has that already, or has it not.
        """
        self.tokens = tokens
        self._keep_outputs = keep_outputs
        self.config: ModelConfig = source.config
        self._text = text
        self._source = source
        self.device = open_device(device)
        self._manifest = manifest_of(self.config, {}, tokens, DOWN, self.device)
        self.sensitive = sensitive if state is None else state.sensitive
        self._sensitivity_record = sensitivity_record(tokens) if self.sensitive else {}
        self._path: Path | None = None
        self._state, self._first, self._last = state, 0, 0
        self._error_costs = ErrorCosts(self.config)
        self._out: CalibrationFolder | None = None
        self.coverage = 0.0
        """Share of experts that saw a token, once `finish` has been called."""
        self.devices = with_others(self.device)
        """Devices over which the experts of a layer are spread; the rest of the model runs on the first one."""
        self.stays = self.device.type != "cpu" if stays is None else stays
        self._dropping: Future[None] | None = None
        self._target: tuple[int, NDArray[np.float32]] | None = None
        self._held = layers_held(self.config, tokens.size, self.devices) if ahead and self.stays else 1
        self._layers = SourceLayers(source, tokens, self.devices, self.stays, keep_outputs, self._error_costs)
        self._residents = Residents(self._run, beside_others(self.devices), self._held)

    def bind(self, source: Mapping[str, Any], imatrix: ImatrixModel | None) -> None:
        """Take the source's {origin, files}, and the imatrix that stands behind moments of too few tokens.

        Raises CalibrationError where the state is of another calibration.
        """
        self._manifest = {**self._manifest, "source": dict(source)}
        self._layers = replace(self._layers, imatrix=imatrix)
        if self._state is not None:
            self._state.check(self._manifest | self._sensitivity_record)

    @property
    def _finds(self) -> bool:
        """Whether what errors behind each layer cost is to be found here."""
        return self.sensitive and self._state is None

    def disk_bytes(self, files: int = 1) -> int:
        """The most disk that the moments of a layer and the residual streams around it take beside so many outputs."""
        tuned = files if self._keep_outputs else 0
        size = self.tokens.size
        return inline_sizes(self.config, size, 0, tuned, self._held - 1, self._finds).disk_bytes

    def signature(self) -> dict[str, Any]:
        """What of it decides the built bytes, besides the source."""
        deciding = ("tokens", "down", "device", "gpu")
        kept = {key: value for key, value in self._manifest.items() if key in deciding}
        return {"rows": True, "torch": self._manifest["program"]["torch"], **kept, **self._sensitivity_record}

    def record(self) -> dict[str, Any]:
        """What a file says of it, as far as it is known before the layers are through."""
        return self._record("", 0.0)

    def _record(self, sha256: str, coverage: float) -> dict[str, Any]:
        """Tokens, text and device are what it takes to gather the same again."""
        said = calibration_record(sha256, self._manifest["tokens"], DOWN, coverage)
        made_on = {"torch": torch.__version__, **device_record(self.device)}
        if self.stays:
            made_on["factors"] = self.device.type
        return {**said, "rows": True, "text": self._text, **made_on, **self._sensitivity_record}

    def open(self, path: Path, first: int = 0, last: int | None = None, watch: Watch = UNWATCHED) -> None:
        """Begin, or continue what an unfinished build left in this folder; ResumeError where it is another's.

        No layer before `first` will be begun, and none behind `last` where that is given. What errors behind layers
        cost is found here, of which `watch` hears. The build holds the lock of its output. Raises OutputError where the
        folder is a link or holds anything else.
        """
        if path.is_symlink():
            raise OutputError(
                "is a symbolic link, which is not followed here", file=path, hint="remove the link"
            )
        self._path, self._first = path, first
        self._last = self.config.num_hidden_layers - 1 if last is None else last
        self._out = CalibrationFolder(path, dict(flatten(self._manifest | self._sensitivity_record)))
        start = self._state.start(first) if self._state else 0
        if self._state is not None and len(self._out.journal.done) < start:
            self._out.close()
            discard_folder(path)
            self._out = CalibrationFolder(path, dict(flatten(self._manifest | self._sensitivity_record)))
            self._state.prime(self._out, start)
        if self.sensitive and self._first <= self._last:
            self._find_sensitivities(watch)
        if not self._out.journal.done:
            # Read before the build releases the embeddings, and kept until the first layer has run.
            self._residents.enters(0, self._layers.entering(self._out, 0))

    def close(self) -> None:
        """Let go of the folder, which stays for the next run."""
        self._target = None
        if self._out is not None:
            with suppress(Exception):  # the layer is run again
                self._settle()
            self._residents.close()
            self._out.close()
            self._out = None

    def discard(self) -> None:
        """Remove the folder."""
        self.close()
        if self._path is not None:
            discard_folder(self._path)

    def begin_layer(self, layer: int) -> None:
        """Have one layer's moments ready, and no others: nothing may need those of an earlier layer any more."""
        self._target = None
        self._settle()
        if not self.stays:
            self._restart_if_damaged(layer)
            self._drop(range(min(layer, len(self._folder.journal.done))))
            self._gather_up_to(layer)
            return
        here = self._residents
        here.leave(layer)
        if layer not in here:
            self._restart_if_damaged(layer)
            self._gather_up_to(layer)
        if layer not in here:
            here.start(layer)
        here.importance(layer)
        self._end(layer)

    def under_way(self, layer: int) -> bool:
        """Whether a layer is run already, so that it can be begun while the one before it is still needed: `layer`
        waits for it.
        """
        return layer in self._residents

    def holds_before(self, layer: int) -> bool:
        """Whether `end_before` has anything to do."""
        return self._residents.holds_before(layer)

    def end_before(self, layer: int) -> None:
        """Nothing needs the moments of layers before this one any more, which is under way."""
        self._residents.leave(layer)
        self._end(layer)

    def layer(self, layer: int) -> LayerWithRows:
        """The importances of a layer that was begun and is not ended."""
        if self.stays:
            return self._residents.importance(layer)
        gathered = self._layers.gathered(self._folder, layer)
        rows = self._folder.rows(layer, self.config, self.tokens.size)
        return with_rows(gathered, rows, self._error_costs.row_answers(layer))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[sequences, length, hidden] of the residual streams."""
        return (*self.tokens.shape, self.config.hidden_size)

    def target(self, layer: int) -> NDArray[np.float32]:
        """The source's stream f32 behind a layer, until the next layer is begun; ResumeError where it is damaged.

        It is read once for all files that are built together.
        """
        self._settle()
        if self._target is None or self._target[0] != layer:
            self._target = layer, self._folder.hidden(layer + 1, self.shape)
        return self._target[1]

    def finish(self) -> dict[str, Any]:
        """What a file made with it says of it, as it would of the folder of `calibrate`; all layers must be through."""
        self._gather_up_to(self.config.num_hidden_layers - 1)
        self._settle()
        sha256 = hashlib.sha256(manifest_text(self._manifest, self._records)).hexdigest()
        self.coverage = coverage_of(self.config, self._records)
        return self._record(sha256, self.coverage)

    @property
    def _folder(self) -> CalibrationFolder:
        if self._out is None:
            raise RuntimeError("GatheredImportance.open comes first")
        return self._out

    @property
    def _records(self) -> list[dict[str, Any]]:
        return [self._folder.record(n) for n in range(len(self._folder.journal.done))]

    def _intact(self, layer: int) -> bool:
        """Whether what is needed of a finished layer is still there, or, where its rows stay on the device, the stream
        from which they are made again."""
        return layer in self._residents or self._intact_on_disk(layer)

    def _intact_on_disk(self, layer: int) -> bool:
        return self._folder.intact(layer) and (not self.stays or self._folder.has_hidden(layer))

    def _restart_if_damaged(self, layer: int) -> None:
        """Begin the run of the model anew where the moments of a layer are gone that has to be encoded once more."""
        if layer < len(self._folder.journal.done) and not self._intact(layer):
            assert self._path is not None
            self.close()
            discard_folder(self._path, but_sensitivities=True)
            self.open(self._path, self._first, self._last)

    def _gather_up_to(self, layer: int) -> None:
        """Run the model to the end of `layer`, from where the last run of it stopped."""
        self._settle()
        for n in range(len(self._folder.journal.done), layer + 1):
            if self.stays:
                self._residents.start(n)
            else:
                kept, layers = self._residents.take(n), self._layers
                entering = layers.entering(self._folder, n) if kept is None else kept
                layers.gather(self._folder, n, entering).finish()
            if n < layer:
                self._settle()
                self._residents.leave(n + 1)
                self._folder.drop(n)

    def _find_sensitivities(self, watch: Watch) -> None:
        if self._state is not None:
            layers = range(self._state.start(self._first), self._last + 1)
            self._error_costs.found(self._state.path, self._state.sensitivities_of(layers))
            return
        assert self._path is not None
        signature = dict(flatten(self._manifest | self._sensitivity_record))
        hashes = find_sensitivities(self._source, self.tokens, self.device, self._path, signature, watch)
        make_room(self.devices, 0.0)  # other streams come now, which cannot use what these have left
        self._error_costs.found(self._path, hashes)

    def costs(self, layer: int) -> NDArray[np.float32] | None:
        """What errors behind a layer cost, as `ErrorCosts.factor` says."""
        return self._error_costs.factor(layer)

    def _run(self, layer: int, entering: Tensor | None) -> tuple[Resident, Callable[[], None]]:
        """A layer on the devices: run, or where it is finished already what its experts saw, as `resident.Run` says."""
        layers, folder = self._layers, self._folder
        if layer < len(folder.journal.done) and self._intact_on_disk(layer):
            return layers.again(folder, layer), lambda: None
        made = layers.run_to_stay(
            folder, layer, layers.entering(folder, layer) if entering is None else entering
        )
        if self._held == 1:
            make_room(self.devices)
        return made

    def _end(self, layer: int) -> None:
        """Remove what is kept of layers before this one, and run the next one, where it has room beside this one."""
        self._settle_drops()
        self._dropping = on_a_thread(partial(self._drop, range(layer)))
        self._residents.fill(self._last)

    def _drop(self, layers: range) -> None:
        for layer in layers:
            self._folder.drop(layer)

    def _settle_drops(self) -> None:
        dropping, self._dropping = self._dropping, None
        if dropping is not None:
            dropping.result()

    def _settle(self) -> None:
        """Wait until nothing is under way beside this thread, and raise what stood in its way."""
        self._residents.settle()
        self._settle_drops()
