"""Layers of a source as a build runs them. Their moments go to the build's folder; of a layer that stays, weights and
what its experts saw lie on the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...awq.from_imatrix import ImatrixModel
from ...awq.from_moments import CalibratedLayer
from ...awq.row_answers import RowAnswers
from ...formats.checkpoint.source import Source
from ...formats.minimax import ModelConfig
from ...formats.statistics.moment_file import DownForm
from ...verify.model.device_weights import DeviceWeights, wait_for
from ...verify.model.spread_forward import spread_before_experts
from ..encode.on_device.kept import keep_on_device
from .error_costs import ErrorCosts
from .folder import CalibrationFolder
from .layer_pass import Gathered, device_weights, enter, gather_layer
from .moments import LayerMoments
from .resident import Resident, on_a_thread
from .tokens import Tokens

DOWN: DownForm = "pooled"
"""Only the layer's moment at down is kept: an expert's own follows from its rows when it is encoded."""


@dataclass(frozen=True)
class SourceLayers:
    """What it takes to run a layer on `tokens`. Layers stay on the `devices` or not; with `keep_last` the stream behind
    the last one is kept; an `imatrix` stands behind moments of too few tokens.
    """

    source: Source
    tokens: Tokens
    devices: tuple[torch.device, ...]
    stay: bool
    keep_last: bool
    costs: ErrorCosts
    imatrix: ImatrixModel | None = None

    @property
    def config(self) -> ModelConfig:
        """The source's."""
        return self.source.config

    def entering(self, folder: CalibrationFolder, layer: int) -> Tensor:
        """The stream that enters a layer; ResumeError where the file that has it is gone or damaged."""
        return enter(self.source, self.config, folder, self.tokens, layer)

    def gather(
        self,
        folder: CalibrationFolder,
        layer: int,
        hidden: Tensor,
        weights: Source | DeviceWeights | None = None,
    ) -> Gathered:
        """Run a layer on the stream that enters it; without `weights` they are read as they are needed."""
        return gather_layer(
            self.source if weights is None else weights,
            self.config,
            layer,
            hidden.to(self.devices[0]),
            folder,
            DOWN,
            keep_rows="here" if self.stay else "on disk",
            keep_last=self.keep_last,
        )

    def gathered(
        self, folder: CalibrationFolder, layer: int, record: Mapping[str, Any] | None = None
    ) -> CalibratedLayer:
        """What the file of a layer says, as its record describes it, by default that of the journal."""
        behind = self.imatrix.layer(layer) if self.imatrix else None
        return folder.layer(layer, self.config, DOWN, record or folder.record(layer), behind)

    def run_to_stay(
        self, folder: CalibrationFolder, layer: int, hidden: Tensor
    ) -> tuple[Resident, Callable[[], None]]:
        """Run a layer and leave it on the devices; also what makes it durable, which may be done on another thread."""
        weights, answers = device_weights(self.source, self.devices, layer), self._row_answers(layer)
        done = self.gather(folder, layer, hidden, weights)
        assert done.rows is not None
        gathered = self.gathered(folder, layer, done.record)
        return self._resident(weights, gathered, done.rows, answers, done.behind), done.finish

    def again(self, folder: CalibrationFolder, layer: int) -> Resident:
        """What the experts of a finished layer saw, from the stream that enters the layer."""
        weights, answers = device_weights(self.source, self.devices, layer), self._row_answers(layer)
        moments = LayerMoments(self.config, layer, DOWN, keep_rows=True)
        with torch.inference_mode():
            hidden = self.entering(folder, layer).to(self.devices[0])
            spread_before_experts(weights, self.config, layer, hidden, moments)
        assert moments.rows is not None
        return self._resident(weights, self.gathered(folder, layer), moments.rows, answers, None)

    def _row_answers(self, layer: int) -> Future[RowAnswers | None]:
        """How rows of down answer, beside the run: it takes a core about as long as that takes a GPU."""
        return on_a_thread(partial(self.costs.row_answers, layer))

    def _resident(
        self,
        weights: DeviceWeights,
        gathered: CalibratedLayer,
        rows: tuple[Tensor, Tensor],
        answers: Future[RowAnswers | None],
        behind: Tensor | None,
    ) -> Resident:
        """What stays of a layer, complete on the devices."""
        importance = keep_on_device(gathered, *rows, weights.matrix, self.devices[1:], answers.result())
        wait_for(*self.devices)
        return Resident(weights, importance, behind)
