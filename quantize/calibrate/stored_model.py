"""A model as a recipe would store it, one layer at a time: weights that were encoded and decoded again.

With it a calibration can feed each layer what the quantised layers before it put out. Experts are encoded ahead on a
pool of threads, in the order in which the reference forward asks for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...awq.importance import LayerImportance
from ...formats.blocks import Format
from ...formats.hfq.stored import StoredForm
from ...formats.minimax import PROJECTIONS, ModelConfig, expert_name
from ...verify.model.reference import Weights, layer_forward
from ..encode.blas import one_blas_thread
from ..encode.layer_encoder import LayerEncoder
from ..encode.overflow import encode_tensor
from ..encode.prepared_layer import FitSettings, fit_settings
from ..spec.plan import plan_tensors
from ..spec.recipe import Recipe

F32 = NDArray[np.float32]


def plain_weight(source: Weights, name: str, fmt: Format, settings: FitSettings) -> F32:
    """A tensor outside the experts as it would be stored and read again, f32 of its shape."""
    values = source.weight(name)
    return StoredForm(fmt).decode(encode_tensor(name, values, fmt, settings.fit), values.shape)


class StoredLayerWeights:
    """The weights of one layer after encoding and decoding. A context manager, since it owns threads.

    Experts must be asked for in ascending order, and each projection once; some experts may be left out.
    """

    def __init__(
        self,
        source: Weights,
        config: ModelConfig,
        importance: LayerImportance,
        formats: Mapping[str, Format],
        settings: FitSettings,
        jobs: int,
    ) -> None:
        self.source, self.formats, self.settings = source, formats, settings
        self.layer = importance.layer
        of_experts = {p: formats[expert_name(self.layer, 0, p)] for p in PROJECTIONS}
        self.encoder = LayerEncoder(config, self.layer, importance, of_experts, settings)
        self.encoder.prepare({name: source.weight(name) for name in self.encoder.needs_samples()})
        experts = range(config.num_local_experts)
        self._experts = {expert_name(self.layer, e, p): e for e in experts for p in PROJECTIONS}
        self._pool, self._jobs = ThreadPoolExecutor(jobs, thread_name_prefix="store"), jobs
        self._waiting = deque(experts)
        self._coming: deque[tuple[int, Future[dict[str, F32]]]] = deque()
        self._held: dict[str, F32] = {}

    def __enter__(self) -> StoredLayerWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def weight(self, name: str) -> F32:
        """One tensor of the layer as a reader of the built file gets it, f32 of its shape."""
        if name not in self._experts:
            return plain_weight(self.source, name, self.formats[name], self.settings)
        if name not in self._held:
            self._next(self._experts[name])
        return self._held.pop(name)

    def _next(self, expert: int) -> None:
        """Hold the matrices of `expert`, with those of the following ones on their way."""
        while True:
            while self._waiting and len(self._coming) <= self._jobs:
                e = self._waiting.popleft()
                self._coming.append((e, self._pool.submit(self._expert, e)))
            ready, future = self._coming.popleft()
            if ready >= expert:
                self._held = future.result()
                return

    def _expert(self, expert: int) -> dict[str, F32]:
        w1, w2, w3 = (self.source.weight(expert_name(self.layer, expert, p)) for p in PROJECTIONS)
        shapes = {"w1": w1.shape, "w2": w2.shape, "w3": w3.shape}
        done = self.encoder.encode_expert(expert, w1, w3, w2)
        return {
            # Without the expert's fold: it cancels between w3 and w2.
            expert_name(self.layer, expert, p): self.encoder.stored.form(p).decode(
                done.payloads[p], shapes[p]
            )
            for p in PROJECTIONS
        }


class StoredModelWeights:
    """A source as a recipe stores it."""

    def __init__(self, source: Weights, config: ModelConfig, recipe: Recipe, jobs: int) -> None:
        """Raises RecipeError or WeightError where the recipe cannot store this model."""
        self.source, self.config, self.jobs = source, config, jobs
        self.settings = fit_settings(recipe)
        self.formats = {t.name: t.format for t in plan_tensors(recipe, config)}

    def weight(self, name: str) -> F32:
        """A tensor outside the layers, f32 of its shape."""
        return plain_weight(self.source, name, self.formats[name], self.settings)

    @one_blas_thread()
    def forward(self, importance: LayerImportance, hidden: Tensor) -> Tensor:
        """The residual stream f32 [sequences, length, hidden] behind a layer that was encoded under this importance."""
        with StoredLayerWeights(
            self.source, self.config, importance, self.formats, self.settings, self.jobs
        ) as weights:
            return layer_forward(weights, self.config, importance.layer, hidden)
