"""How much errors behind each layer cost: the source runs once forward and once back, before it is calibrated.

The gradient of the model's log-probabilities is carried back from the head, layer by layer; the second moment of its
directions behind a layer is the layer's sensitivity (see `awq.row_answers`). The streams between layers lie on the disk
meanwhile. Each layer's stream, and on the way back its sensitivity and the gradient before it, are durable before a
journal names them, so that a run that was killed continues there. The disk is read and written, and moments are taken,
beside the next layer's work, and experts and sequences are spread over all GPUs, without a bit of difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.checkpoint.source import Source
from ...formats.errors import CalibrationError, ResumeError
from ...formats.minimax import ModelConfig, layer_inventory
from ...formats.watch import UNWATCHED, Watch
from ...verify.model.backward import head_gradient, layer_backward
from ...verify.model.device_weights import wait_for
from ...verify.model.lanes import Lanes
from ...verify.model.reference import embed
from ..encode.on_device.transfer import pieces_of, sent
from ..spec.calibration_sizes import CHUNK
from ..write.in_order import InOrder
from ..write.journal import CALIBRATION, Journal
from ..write.stream_folder import StreamFolder
from .layer_pass import beside_others, layers_in_turn, run_source, with_others
from .sensitivity_files import damaged_file, first_tokens, write_sensitivity
from .sums import packed, second_moment
from .tokens import Tokens

F32 = NDArray[np.float32]

JOURNAL = "sensitivity.journal"
STREAM, GRADIENT, SENSITIVITY = "stream", "gradient", "sensitivity"
_RESTART = "give --restart to discard it and begin anew"


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
    many weights each. `beside()` makes the work of a thread on the devices wait for none of others.
    """

    source: Source
    devices: tuple[torch.device, ...]
    shape: tuple[int, ...]
    sizes: Sequence[int]
    watch: Watch
    disk: InOrder
    beside: Callable[[], AbstractContextManager[object]]
    lanes: Lanes


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
        found = {
            n: self._journal.done.get(_unit(SENSITIVITY, n)) for n in range(self._config.num_hidden_layers)
        }
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
                devices = with_others(device)
                way = _Way(source, devices, shape, sizes, watch, disk, beside_others(devices), Lanes(devices))
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
        for layer, weights in layers_in_turn(way.source, way.devices, range(first, len(way.sizes))):
            with torch.no_grad():
                stream = run_source(weights, self._config, layer, stream, lanes=way.lanes)
            wait_for(*way.devices)
            way.disk.do(
                partial(self._save, way, STREAM, layer + 1, stream), partial(self._end_forward, way, layer)
            )
        return stream

    def _end_forward(self, way: _Way, layer: int, sha256: str) -> None:
        """Note that a layer has run, and that the stream behind it is durable."""
        self._journal.record(_unit(STREAM, layer + 1), sha256)
        way.watch.advance(way.sizes[layer], f"layer {layer}")

    def _back(self, way: _Way, gradient: Tensor, last: int) -> None:
        """Write the sensitivity of each layer from `last` down to the first; `gradient` is the one behind `last`."""
        way.disk.wait()
        with ThreadPoolExecutor(1, thread_name_prefix="streams") as reader:

            def read(layer: int) -> Future[Tensor]:
                return reader.submit(self._entering, way, layer)

            coming = read(last) if last else None
            for layer, weights in layers_in_turn(way.source, way.devices, range(last, -1, -1)):
                behind, before = gradient, None
                if coming is not None:
                    entering = coming.result()
                    coming = read(layer - 1) if layer > 1 else None
                    before = gradient = layer_backward(
                        weights, self._config, layer, entering, behind, way.lanes
                    )
                    wait_for(*way.devices)
                way.disk.do(
                    partial(self._write, way, layer, behind, before), partial(self._end_back, way, layer)
                )

    def _write(self, way: _Way, layer: int, behind: Tensor, before: Tensor | None) -> tuple[str, str | None]:
        """Make durable what errors behind a layer cost, by the gradient `behind` it, and the one `before` it."""
        with way.beside():
            moment, count = _of_directions(behind, layer)
        sha256 = write_sensitivity(self._folder, layer, moment, count)
        return sha256, None if before is None else self._save(way, GRADIENT, layer - 1, before)

    def _end_back(self, way: _Way, layer: int, written: tuple[str, str | None]) -> None:
        """Note what `_write` wrote, and drop what is not needed any more."""
        sensitivity, gradient = written
        if gradient is not None:
            self._journal.record(_unit(GRADIENT, layer - 1), gradient)
        self._journal.record(_unit(SENSITIVITY, layer), sensitivity)
        self._drop(layer)
        way.watch.advance(way.sizes[layer], f"layer {layer}, back")

    def _drop(self, layer: int) -> None:
        """Remove the stream and the gradient behind a layer that is done."""
        self._streams.drop(STREAM, layer + 1)
        self._streams.drop(GRADIENT, layer)

    def _save(self, way: _Way, name: str, layer: int, stream: Tensor) -> str:
        with way.beside():
            return self._streams.save_pieces(name, layer, pieces_of(stream))

    def _load(self, name: str, layer: int, shape: tuple[int, ...]) -> F32:
        sha256 = self._journal.done[_unit(name, layer)]["xxh64"]
        return self._streams.load(name, layer, shape, sha256)

    def _entering(self, way: _Way, layer: int) -> Tensor:
        """The stream that enters a layer, complete on the first device."""
        with way.beside():
            stream = sent(self._load(STREAM, layer, way.shape), way.devices[0])
            wait_for(way.devices[0])
        return stream


def _unit(name: str, layer: int) -> str:
    return f"{name}.{layer}"


def _of_directions(gradient: Tensor, layer: int) -> tuple[F32, int]:
    """E[g gᵀ], packed, of the gradients [n_seq, len, hidden] behind a layer, each of length 1, and how many have one;
    CalibrationError where none has.
    """
    rows = gradient.flatten(0, 1)
    energy = [part.double().square().sum(1) for part in torch.split(rows, CHUNK)]
    length = torch.cat(energy).sqrt().float()
    good = length.isfinite() & (length > 0)
    rows, count = rows[good].div_(length[good, None]), int(good.sum())
    if not count:
        raise CalibrationError(
            f"layer {layer}: no token has a finite gradient",
            hint="give --no-sensitivity, or look at the checkpoint: its activations overflow",
        )
    return packed(second_moment(rows) / count).cpu().numpy(), count


def _draws(tokens: Tokens) -> Tensor:
    """Numbers f32 even in [0, 1), one for each token, the same in every run."""
    return torch.from_numpy(np.random.default_rng(0).random(tokens.shape, np.float32))
