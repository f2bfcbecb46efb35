"""How much errors behind each layer cost: the source runs once forward and once back, before it is calibrated.

The gradient of the model's log-probabilities is carried back from the head, layer by layer; the second moment of its
directions behind a layer is the layer's sensitivity (see `awq.row_answers`). The streams between layers lie on the disk
meanwhile. Each layer's stream, and on the way back its sensitivity and the gradient before it, are durable before a
journal names them, so that a run that was killed continues there. The disk is read and written beside the next layer's
work, and experts and sequences are spread over all GPUs, without a bit of difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...awq.row_answers import Sensitivity
from ...formats.checkpoint.source import Source
from ...formats.errors import CalibrationError, ResumeError
from ...formats.minimax import ModelConfig, layer_inventory
from ...formats.statistics.moment_file import encode_layer, open_tensors, pack_moment, triangle, unpack_moment
from ...formats.unchanged import UnchangedFile
from ...formats.watch import UNWATCHED, Watch
from ...verify.model.backward import head_gradient, layer_backward
from ...verify.model.device_weights import DeviceWeights
from ...verify.model.reference import Weights, embed
from ..encode.on_device.transfer import fetched, sent
from ..spec.calibration_sizes import SENSITIVITY_TOKENS
from ..write.atomic import write_atomic
from ..write.in_order import InOrder
from ..write.journal import CALIBRATION, Journal
from ..write.stream_folder import StreamFolder
from .layer_pass import layer_weights, run_source, with_others
from .moments import second_moment
from .tokens import Tokens

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

JOURNAL = "sensitivity.journal"
STREAM, GRADIENT = "stream", "gradient"
_NAME = "sensitivity"
_RESTART = "give --restart to discard it and begin anew"


def sensitivity_file(layer: int) -> str:
    """The sensitivity of the stream behind a layer."""
    return f"sensitivity-{layer:05d}.safetensors"


def first_tokens(tokens: Tokens) -> Tokens:
    """The sequences that sensitivities come from: the first ones, SENSITIVITY_TOKENS tokens or a little more."""
    return tokens[: -(-SENSITIVITY_TOKENS // tokens.shape[1])]


def sensitivity_record(tokens: Tokens) -> dict[str, Any]:
    """What a manifest says of it."""
    return {"sensitivity": {"tokens": int(first_tokens(tokens).size)}}


def read_sensitivity(folder: Path, layer: int, config: ModelConfig, sha256: object) -> Sensitivity:
    """The sensitivity behind a layer, as it was written with this hash; CalibrationError."""
    shape = {_NAME: ("F32", (triangle(config.hidden_size),)), "tokens": ("I64", (1,))}
    file = open_tensors(folder / sensitivity_file(layer), shape, str(sha256))
    return Sensitivity(unpack_moment(file.array(_NAME), config.hidden_size), int(file.array("tokens")[0]))


def damaged_file(folder: Path, hashes: Mapping[int, str]) -> Path | None:
    """The first of these layers' files that is gone, or not as it was written."""
    for layer, sha256 in hashes.items():
        file = folder / sensitivity_file(layer)
        if not file.is_file() or UnchangedFile(file, CalibrationError).sha256() != sha256:
            return file
    return None


def find_sensitivities(
    source: Source,
    tokens: Tokens,
    device: torch.device,
    folder: Path,
    signature: Mapping[str, Any],
    watch: Watch = UNWATCHED,
) -> dict[int, str]:
    """The hash of each layer's file in a folder that the caller has locked, once a run there is complete; raises as
    `SensitivityRun` does.
    """
    run = SensitivityRun(folder, source.config, signature)
    try:
        run.complete(source, first_tokens(tokens), device, watch)
        return run.hashes
    finally:
        run.close()


@dataclass(frozen=True)
class _Way:
    """What the way forward and the way back have in common: streams have a shape [n_seq, len, hidden], and layers so
    many weights each.
    """

    source: Source
    devices: tuple[torch.device, ...]
    shape: tuple[int, ...]
    sizes: Sequence[int]
    watch: Watch
    disk: InOrder


class SensitivityRun:
    """A run forward and back in a folder that its caller has locked; where it is complete, `hashes` has every layer."""

    def __init__(self, folder: Path, config: ModelConfig, signature: Mapping[str, Any]) -> None:
        """Begin a run in the folder, or continue the one that it holds; ResumeError where that is another's."""
        self._folder, self._config = folder, config
        self._streams = StreamFolder(folder, anew=False, hint=_RESTART)
        self._journal = Journal(folder / JOURNAL, CALIBRATION)
        try:
            self._journal.begin(signature)
        except BaseException:
            self._journal.close()
            raise

    def close(self) -> None:
        """Let go of the journal, which stays for the next run where it names anything."""
        if not self._journal.done:
            self._journal.remove()
        self._journal.close()

    @property
    def hashes(self) -> dict[int, str]:
        """The SHA-256 of the file of each layer that is done."""
        found = {n: self._journal.done.get(_unit(_NAME, n)) for n in range(self._config.num_hidden_layers)}
        return {n: record["xxh64"] for n, record in found.items() if record is not None}

    def complete(
        self, source: Source, tokens: Tokens, device: torch.device, watch: Watch = UNWATCHED
    ) -> None:
        """Do what is left of it. Raises CalibrationError where no gradient is finite, and ResumeError where a file that
        an earlier run left is gone or damaged.
        """
        count = self._config.num_hidden_layers
        if damaged := damaged_file(self._folder, self.hashes):
            raise ResumeError("is not as the earlier run left it", file=damaged, hint=_RESTART)
        if len(self.hashes) < count:
            layers = [layer_inventory(self._config, n) for n in range(count)]
            sizes = [sum(int(np.prod(spec.shape)) for spec in specs) for specs in layers]
            forward = sum(_unit(STREAM, n + 1) in self._journal.done for n in range(count))
            done = sum(sizes[:forward]) + sum(sizes[n] for n in self.hashes)
            watch.begin("finding what errors cost", 2 * sum(sizes), "weights", done)
            shape = (*tokens.shape, self._config.hidden_size)
            last = min(self.hashes, default=count) - 1
            with InOrder() as disk:
                way = _Way(source, with_others(device), shape, sizes, watch, disk)
                if last + 1 == count:
                    gradient = head_gradient(
                        source, self._config, self._forward(way, tokens, forward), _draws(tokens)
                    )
                else:
                    gradient = sent(self._load(GRADIENT, last, shape), device)
                self._back(way, gradient, last)
        for layer in range(count):  # those that a run left which was killed before it could drop them
            self._drop(layer)

    def _forward(self, way: _Way, tokens: Tokens, first: int) -> Tensor:
        """The stream behind the last layer, once all layers from `first` on have run."""
        given = self._load(STREAM, first, way.shape) if first else embed(way.source, tokens).numpy()
        stream = sent(given, way.devices[0])
        for layer, weights in _ahead(way, range(first, len(way.sizes))):
            with torch.no_grad():
                stream = run_source(weights, self._config, layer, stream)
            way.disk.do(partial(self._run_forward, way, layer, fetched(stream)))
        way.disk.wait()
        return stream

    def _run_forward(self, way: _Way, layer: int, stream: F32) -> None:
        """Make durable that a layer has run."""
        self._save(STREAM, layer + 1, stream)
        way.watch.advance(way.sizes[layer], f"layer {layer}")

    def _back(self, way: _Way, gradient: Tensor, last: int) -> None:
        """Write the sensitivity of each layer from `last` down to the first; `gradient` is the one behind `last`."""
        with ThreadPoolExecutor(1, thread_name_prefix="streams") as reader:

            def read(layer: int) -> Future[F32]:
                return reader.submit(self._load, STREAM, layer, way.shape)

            coming = read(last) if last else None
            for layer, weights in _ahead(way, range(last, -1, -1)):
                moment, count = _of_directions(gradient, layer)
                before = None
                if coming is not None:
                    entering = sent(coming.result(), way.devices[0])
                    coming = read(layer - 1) if layer > 1 else None
                    gradient = layer_backward(weights, self._config, layer, entering, gradient)
                    before = fetched(gradient)
                way.disk.do(partial(self._run_back, way, layer, moment, count, before))

    def _run_back(self, way: _Way, layer: int, moment: F64, count: int, before: F32 | None) -> None:
        """Make durable what errors behind a layer cost, and the gradient `before` it."""
        arrays = {_NAME: pack_moment(moment), "tokens": np.array([count])}
        sha256 = write_atomic(self._folder / sensitivity_file(layer), encode_layer(arrays)).sha256
        if before is not None:
            self._save(GRADIENT, layer - 1, before)
        self._journal.record(_unit(_NAME, layer), sha256)
        self._drop(layer)
        way.watch.advance(way.sizes[layer], f"layer {layer}, back")

    def _drop(self, layer: int) -> None:
        """Remove the stream and the gradient behind a layer that is done."""
        self._streams.drop(STREAM, layer + 1)
        self._streams.drop(GRADIENT, layer)

    def _save(self, name: str, layer: int, stream: F32) -> None:
        self._journal.record(_unit(name, layer), self._streams.save(name, layer, stream))

    def _load(self, name: str, layer: int, shape: tuple[int, ...]) -> F32:
        sha256 = self._journal.done[_unit(name, layer)]["xxh64"]
        return self._streams.load(name, layer, shape, sha256)


def _unit(name: str, layer: int) -> str:
    return f"{name}.{layer}"


def _of_directions(gradient: Tensor, layer: int) -> tuple[F64, int]:
    """E[g gᵀ] f64 [hidden, hidden] of the gradients [n_seq, len, hidden] behind a layer, each of length 1, and how many
    have one; CalibrationError where none has.
    """
    rows = gradient.flatten(0, 1)
    length = rows.double().square().sum(1).sqrt().float()
    good = length.isfinite() & (length > 0)
    rows, count = rows[good] / length[good, None], int(good.sum())
    if not count:
        raise CalibrationError(
            f"layer {layer}: no token has a finite gradient",
            hint="give --no-sensitivity, or look at the checkpoint: its activations overflow",
        )
    moment: F64 = (second_moment(rows) / count).cpu().numpy()
    return moment, count


def _draws(tokens: Tokens) -> Tensor:
    """Numbers f32 even in [0, 1), one for each token, the same in every run."""
    return torch.from_numpy(np.random.default_rng(0).random(tokens.shape, np.float32))


def _ahead(way: _Way, layers: Sequence[int]) -> Iterator[tuple[int, Weights | DeviceWeights]]:
    """The weights of layers in turn; on a GPU the next one's are read meanwhile."""
    with ExitStack() as last:
        coming: list[tuple[ExitStack, Weights | DeviceWeights]] = []

        def begin(layer: int) -> None:
            opened = ExitStack()
            last.callback(opened.close)
            coming.append((opened, opened.enter_context(layer_weights(way.source, way.devices, layer))))

        for place, layer in enumerate(layers):
            if not coming:
                begin(layer)
            if place + 1 < len(layers):
                begin(layers[place + 1])
            opened, weights = coming.pop(0)
            yield layer, weights
            opened.close()
