"""A calibration that a build gathers for itself: what a layer's experts see, just before the layer is encoded.

Besides the moments that all experts of the layer share, the rows are kept that they saw, so that each expert is rounded
under moments of its own. Both are dropped with the layer: between layers only the residual stream and the journal are
kept, beside the output. A layer whose moments are gone and needed again is gathered anew from the first layer.

On a GPU with room for two layers the source runs a layer ahead: while one is encoded, the next one is gathered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...awq.from_imatrix import ImatrixModel
from ...awq.from_moments import CalibratedLayer, calibration_record, coverage_of
from ...awq.importance import LayerImportance
from ...awq.own_moments import with_rows
from ...formats.checkpoint.source import Source
from ...formats.errors import OutputError
from ...formats.minimax import ModelConfig, layer_inventory
from ...formats.statistics.moment_file import DownForm
from ...verify.model.device_weights import DeviceWeights
from ...verify.model.reference import before_experts
from ..encode.on_device.kept import KeptOnDevice, keep_on_device
from ..encode.on_device.transfer import wait_for
from ..spec.calibration_sizes import inline_sizes
from ..spec.provenance import flatten
from .folder import CalibrationFolder, discard_folder, manifest_text
from .layer_pass import (
    Gathered,
    beside_others,
    device_record,
    enter,
    gather_layer,
    make_room,
    manifest_of,
    open_device,
    other_devices,
    room_for_two,
)
from .moments import LayerMoments
from .tokens import Tokens

if TYPE_CHECKING:
    from .state import CalibrationState

T = TypeVar("T")

DOWN: DownForm = "pooled"
"""Only the layer's moment at down is kept: an expert's own follows from its rows when it is encoded."""


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
    ) -> None:
        """Raises BackendError where there is no such device. `bind` completes it.

        `text` is the sha256 of the text that travels with the package, where the tokens are of that. With
        `keep_outputs` the stream behind the last layer is kept too, so that every layer has a `target`. Where it
        `stays`, what the experts of a layer see is left on the device until the next layer is begun, and is not
        written: so it is on a GPU, unless said otherwise. Then the next layer is gathered meanwhile, where the device
        has room for two. With a `state` no layer has to be run before the first one that is needed.
        """
        self.tokens = tokens
        self._keep_outputs = keep_outputs
        self.config: ModelConfig = source.config
        self._text = text
        self._source = source
        self.device = open_device(device)
        self._manifest = manifest_of(self.config, {}, tokens, DOWN, self.device)
        self._imatrix: ImatrixModel | None = None
        self._path: Path | None = None
        self._state, self._first, self._last = state, 0, 0
        self._out: CalibrationFolder | None = None
        self.coverage = 0.0
        """Share of experts that saw a token, once `finish` has been called."""
        self._entering: tuple[int, Tensor | None] = 0, None
        self.others = other_devices(self.device)
        """Devices over which the experts of a layer are spread beside the one on which the model runs."""
        self.stays = self.device.type != "cpu" if stays is None else stays
        self._coming: dict[int, Coming] = {}
        self._dropping: Future[None] | None = None
        self.runs_ahead = self.stays and room_for_two(self.config, tokens.size, self.device)
        self._stream = beside_others(self.device)

    def bind(self, source: Mapping[str, Any], imatrix: ImatrixModel | None) -> None:
        """Take the source's {origin, files}, and the imatrix that stands behind moments of too few tokens.

        Raises CalibrationError where the state is of another calibration.
        """
        self._manifest = {**self._manifest, "source": dict(source)}
        self._imatrix = imatrix
        if self._state is not None:
            self._state.check(self._manifest)

    def disk_bytes(self, files: int = 1) -> int:
        """The most disk that the moments of a layer and the residual streams around it take beside so many outputs."""
        tuned = files if self._keep_outputs else 0
        return inline_sizes(self.config, self.tokens.size, tuned=tuned, ahead=self.runs_ahead).disk_bytes

    def signature(self) -> dict[str, Any]:
        """What of it decides the built bytes, besides the source."""
        deciding = ("tokens", "down", "device", "gpu")
        kept = {key: value for key, value in self._manifest.items() if key in deciding}
        return {"rows": True, "torch": self._manifest["program"]["torch"], **kept}

    def record(self) -> dict[str, Any]:
        """What a file says of it, as far as it is known before the layers are through."""
        return self._record("", 0.0)

    def _record(self, sha256: str, coverage: float) -> dict[str, Any]:
        """Tokens, text and device are what it takes to gather the same again."""
        said = calibration_record(sha256, self._manifest["tokens"], DOWN, coverage)
        made_on = {"torch": torch.__version__, **device_record(self.device)}
        if self.stays:
            made_on["factors"] = self.device.type
        return {**said, "rows": True, "text": self._text, **made_on}

    def open(self, path: Path, first: int = 0, last: int | None = None) -> None:
        """Begin, or continue what an unfinished build left in this folder; ResumeError where it is another's.

        No layer before `first` will be begun, and none behind `last` where that is given. The build holds the lock of
        its output. Raises OutputError where the folder is a link or holds anything else.
        """
        if path.is_symlink():
            raise OutputError(
                "is a symbolic link, which is not followed here", file=path, hint="remove the link"
            )
        self._path, self._first = path, first
        self._last = self.config.num_hidden_layers - 1 if last is None else last
        self._out = CalibrationFolder(path, dict(flatten(self._manifest)))
        start = self._state.start(first) if self._state else 0
        if self._state is not None and len(self._out.journal.done) < start:
            self._out.close()
            discard_folder(path)
            self._out = CalibrationFolder(path, dict(flatten(self._manifest)))
            self._state.prime(self._out, start)
        if not self._out.journal.done:
            # Read before the build releases the embeddings, and kept until the first layer has run.
            self._entering = 0, enter(self._source, self.config, self._out, self.tokens, 0)

    def close(self) -> None:
        """Let go of the folder, which stays for the next run."""
        if self._out is not None:
            with suppress(Exception):  # the layer is run again
                self._settle()
            for coming in self._coming.values():
                wait([coming.written])
                coming.let_go()
            self._coming.clear()
            self._out.close()
            self._out = None

    def discard(self) -> None:
        """Remove the folder."""
        self.close()
        if self._path is not None:
            discard_folder(self._path)

    def begin_layer(self, layer: int) -> None:
        """Have one layer's moments ready, and no others: nothing may need those of an earlier layer any more."""
        self._settle()
        if not self.stays:
            self._restart_if_damaged(layer)
            self._drop(range(min(layer, len(self._folder.journal.done))))
            self._gather_up_to(layer)
            return
        self._leave(layer)
        if layer not in self._coming:
            self._restart_if_damaged(layer)
            self._gather_up_to(layer)
        if layer not in self._coming:
            self._start(layer)
        self._coming[layer].made.result()
        self._end(layer)

    def under_way(self, layer: int) -> bool:
        """Whether a layer is run already, so that it can be begun while the one before it is still needed: `layer`
        waits for it.
        """
        return layer in self._coming

    def holds_before(self, layer: int) -> bool:
        """Whether `end_before` has anything to do."""
        return self.stays and min(self._coming, default=layer) < layer

    def end_before(self, layer: int) -> None:
        """Nothing needs the moments of layers before this one any more, which is under way."""
        self._leave(layer)
        self._end(layer)

    def layer(self, layer: int) -> LayerImportance:
        """The importances of a layer that was begun and is not ended."""
        if self.stays:
            return self._coming[layer].made.result().importance
        gathered = self._gathered(layer, self._folder.record(layer))
        return with_rows(gathered, self._folder.rows(layer, self.config, self.tokens.size))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[sequences, length, hidden] of the residual streams."""
        return (*self.tokens.shape, self.config.hidden_size)

    def target(self, layer: int) -> NDArray[np.float32]:
        """The source's stream f32 behind a layer, until the next layer is begun; ResumeError where it is damaged."""
        self._settle()
        return self._folder.hidden(layer + 1, self.shape)

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
        if not self._folder.intact(layer):
            return False
        return not self.stays or layer in self._coming or self._folder.has_hidden(layer)

    def _restart_if_damaged(self, layer: int) -> None:
        """Begin the run of the model anew where the moments of a layer are gone that has to be encoded once more."""
        if layer < len(self._folder.journal.done) and not self._intact(layer):
            assert self._path is not None
            self.discard()
            self.open(self._path, self._first, self._last)

    def _gather_up_to(self, layer: int) -> None:
        """Run the model to the end of `layer`, from where the last run of it stopped."""
        self._settle()
        for n in range(len(self._folder.journal.done), layer + 1):
            if self.stays:
                self._start(n)
            else:
                self._gather(n, self._entering_of(n), self._source).finish()
            if n < layer:
                self._settle()
                self._leave(n + 1)
                self._folder.drop(n)

    def _entering_of(self, layer: int) -> Tensor:
        """The stream that enters a layer: from the layer before, where that was just run, or as it was saved."""
        (n, stream), self._entering = self._entering, (0, None)
        if stream is None or n != layer:
            return enter(self._source, self.config, self._folder, self.tokens, layer)
        return stream

    def _gather(self, layer: int, hidden: Tensor, weights: Source | DeviceWeights) -> Gathered:
        return gather_layer(
            weights,
            self.config,
            layer,
            hidden.to(self.device),
            self._folder,
            DOWN,
            keep_rows="here" if self.stays else "on disk",
            keep_last=self._keep_outputs,
        )

    def _gather_here(self, layer: int, hidden: Tensor) -> tuple[Resident, Callable[[], None]]:
        """Run a layer and leave it on the device; also what makes it durable, which may be done on another thread."""
        weights = self._weights(layer)
        done = self._gather(layer, hidden, weights)
        assert done.rows is not None
        return self._as_resident(layer, weights, done.rows, done.record, done.behind), done.finish

    def _as_resident(
        self,
        layer: int,
        weights: DeviceWeights,
        rows: tuple[Tensor, Tensor],
        record: Mapping[str, Any],
        behind: Tensor | None = None,
    ) -> Resident:
        """What stays of a layer, complete on the devices."""
        importance = keep_on_device(self._gathered(layer, record), *rows, weights.matrix, self.others)
        wait_for(self.device, *self.others)
        return Resident(layer, weights, importance, behind)

    def _gathered(self, layer: int, record: Mapping[str, Any]) -> CalibratedLayer:
        """What the file of a layer says."""
        behind = self._imatrix.layer(layer) if self._imatrix else None
        return self._folder.layer(layer, self.config, DOWN, record, behind)

    def _start(self, layer: int) -> None:
        """Run a layer, or have again what its experts saw, on a thread of its own, after the layer before."""
        before, known = self._coming.get(layer - 1), layer < len(self._folder.journal.done)
        made: Future[Resident] = Future()

        def run() -> Callable[[], None]:
            behind = before.made.result().behind if before else None
            if known and self._intact(layer):
                made.set_result(self._again(layer))
                return lambda: None
            hidden = self._entering_of(layer) if behind is None else behind
            resident, finish = self._gather_here(layer, hidden)
            if not self.runs_ahead:
                make_room(self.device)
            made.set_result(resident)
            return finish

        def work() -> None:
            with self._stream():
                try:
                    finish = run()
                except BaseException as e:
                    made.set_exception(e)
                    raise
                if before is not None:
                    before.written.result()
                finish()

        self._coming[layer] = Coming(made, _beside(work))

    def _leave(self, layer: int) -> None:
        """Let go of the layers before this one; the stream behind the last of them stays."""
        for n in sorted(n for n in self._coming if n < layer):
            coming = self._coming.pop(n)
            wait([coming.written])
            if n + 1 not in self._coming:
                self._entering = n + 1, coming.made.result().behind
            coming.let_go()

    def _end(self, layer: int) -> None:
        """Remove what is kept of layers before this one, and run the next one, where it has room beside this one."""
        self._settle_drops()
        self._dropping = _beside(partial(self._drop, range(layer)))
        coming = max(self._coming) + 1
        if self.runs_ahead and len(self._coming) < 2 and coming <= self._last:
            self._start(coming)

    def _again(self, layer: int) -> Resident:
        """What the experts of a finished layer saw, from the stream that enters the layer."""
        weights = self._weights(layer)
        moments = LayerMoments(self.config, layer, DOWN, keep_rows=True)
        with torch.inference_mode():
            hidden = enter(self._source, self.config, self._folder, self.tokens, layer).to(self.device)
            before_experts(weights, self.config, layer, hidden, moments)
        assert moments.rows is not None
        return self._as_resident(layer, weights, moments.rows, self._folder.record(layer))

    def _weights(self, layer: int) -> DeviceWeights:
        """The weights of a layer on the device."""
        names = [spec.name for spec in layer_inventory(self.config, layer)]
        return DeviceWeights(self._source, self.device, names)

    def _drop(self, layers: range) -> None:
        for layer in layers:
            self._folder.drop(layer)

    def _settle_drops(self) -> None:
        dropping, self._dropping = self._dropping, None
        if dropping is not None:
            dropping.result()

    def _settle(self) -> None:
        """Wait until nothing is under way beside this thread, and raise what stood in its way."""
        for coming in self._coming.values():
            coming.written.result()
        self._settle_drops()


def _beside(work: Callable[[], T]) -> Future[T]:
    """Some work on a thread of its own."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="layer")
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)


@dataclass(frozen=True)
class Resident:
    """A layer whose inputs and weights lie on the device, and the stream f32 [sequences, length, hidden] behind it,
    where the layer was run to its end.
    """

    layer: int
    weights: DeviceWeights
    importance: KeptOnDevice
    behind: Tensor | None


@dataclass(frozen=True)
class Coming:
    """A layer that is run on a thread of its own: it is here once it is `made`, and durable once it is `written`."""

    made: Future[Resident]
    written: Future[None]

    def let_go(self) -> None:
        """Let go of what was made, if it was."""
        if self.made.exception() is None:
            self.made.result().weights.close()
