"""A file against its source: weights and predictions together, layer by layer.

So each shard of a source on the hub is fetched once, and memory holds a layer's streams and one tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..formats.checkpoint.source import Source
from ..formats.errors import InputError, MqError
from ..formats.hfq import HfqFile, TensorEntry
from ..formats.minimax import ModelConfig, TensorSpec, inventory
from ..formats.statistics.imatrix import Imatrix
from ..formats.watch import Watch
from .bars import Bars
from .stages.fidelity import FidelityCheck
from .stages.predictions import PredictionCheck
from .stages.stage import StageResult

T = TypeVar("T")


@dataclass
class Stage:
    """A stage that is worked at in steps: its first error is its result, and the steps after it are left out."""

    name: str
    seconds: float = 0.0
    found: StageResult | None = None

    def step(self, work: Callable[[], T]) -> T | None:
        """What one step gives; None where the stage has ended already."""
        if self.found is not None:
            return None
        began = time.monotonic()
        try:
            return work()
        except MqError as e:
            self.found = StageResult(self.name, 0, "results", (str(e),))
            return None
        finally:
            self.seconds += time.monotonic() - began

    def end(self, work: Callable[[], StageResult]) -> None:
        """The last step, which gives the result."""
        self.found = self.step(work) or self.found

    @property
    def result(self) -> StageResult:
        assert self.found is not None
        return self.found


@dataclass(frozen=True)
class SourceComparison:
    """A file and the source that it was made from; `chosen` limits the tensors whose weights are compared."""

    file: HfqFile
    source: Source
    cfg: ModelConfig
    imatrix: Imatrix | None
    chosen: Sequence[TensorEntry] | None

    def run(
        self,
        tokens: NDArray[np.integer] | None,
        bars: Bars,
        fewest: int,
        notes: tuple[str, ...],
        watch: Watch,
    ) -> list[Stage]:
        """The stage fidelity and, where there are tokens [n_seq, len], the stage predictions."""
        file, source, cfg = self.file, self.source, self.cfg
        weights, models = Stage("fidelity"), Stage("predictions")
        stages = [weights] if tokens is None else [weights, models]
        for stage in stages:
            stage.step(lambda: check_dimensions(file, cfg, source.config))
        fidelity = weights.step(lambda: FidelityCheck(file, source, cfg, self.imatrix, self.chosen))
        predictions = (
            None
            if tokens is None
            else models.step(lambda: PredictionCheck(file, source, cfg, tokens, bars, fewest))
        )
        specs = [s for s in inventory(cfg) if predictions or (fidelity and fidelity.looks_at(s))]
        source.schedule([spec.name for spec in specs])
        watch.begin("against the source", len(specs), "tensors")
        for layer, group in groupby(specs, self._place):
            part = list(group)
            for spec in part:
                if fidelity is not None and fidelity.looks_at(spec):
                    weights.step(partial(fidelity.add, spec))
                watch.advance(1, spec.name)
            if layer == cfg.num_hidden_layers:
                continue
            if predictions is not None:
                models.step(predictions.embed if layer < 0 else partial(predictions.layer, layer))
            for spec in part:
                source.release(spec.name)
        if fidelity is not None:
            weights.end(fidelity.result)
        if predictions is not None:
            models.end(lambda: _noted(predictions.result(watch), notes))
        return stages

    def _place(self, spec: TensorSpec) -> int:
        """The layer of a tensor: −1 for the embeddings, one more than the last for what comes after all layers."""
        if spec.layer is not None:
            return spec.layer
        return -1 if spec.role == "embed" else self.cfg.num_hidden_layers


def _noted(stage: StageResult, notes: tuple[str, ...]) -> StageResult:
    return replace(stage, notes=(*notes, *stage.notes))


DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
)
"""The keys of a config that decide how many tensors there are, their shapes, and the shapes of what flows through."""


def check_dimensions(file: HfqFile, cfg: ModelConfig, source: ModelConfig) -> None:
    """InputError where a file is of a model of other dimensions than the source: nothing can be compared then."""
    different = [
        f"{name} is {getattr(cfg, name)}, the source's {getattr(source, name)}"
        for name in DIMENSIONS
        if getattr(cfg, name) != getattr(source, name)
    ]
    if different:
        raise InputError(f"cannot be compared with the source: {'; '.join(different)}", file=file.path)
