"""One layer as a build would store it, as a source of weights for the reference forward.

With it a calibration can feed each layer what the quantised layers before it put out. Experts are encoded ahead on a
pool of threads, in the order in which the forward asks for them. Depends on encode, blas, plan, recipe and
verify.reference.
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
from ...formats.fwht import unrotate
from ...formats.minimax import PROJECTIONS, ModelConfig, expert_name
from ...verify.model.reference import Weights, layer_forward
from ..encode.blas import one_blas_thread
from ..encode.layer_encoder import FitSettings, LayerEncoder, encode_plain, fit_settings
from ..spec.plan import plan_tensors
from ..spec.recipe import Recipe

F32 = NDArray[np.float32]


def decoded(payload: NDArray[np.uint8], fmt: Format, shape: tuple[int, ...]) -> F32:
    """What a payload stands for, f32 of `shape`, in the basis of the checkpoint but for any scale."""
    values = fmt.decode(payload).reshape(-1)[: int(np.prod(shape))].reshape(shape)
    return unrotate(values) if fmt.rotated else values


def plain_weight(source: Weights, name: str, fmt: Format, settings: FitSettings) -> F32:
    """A tensor outside experts as it would be stored and read again."""
    values = source.weight(name)
    return decoded(encode_plain(values, fmt, settings.fit), fmt, values.shape)


class RequantisedLayer:
    """The weights of one layer after encoding and decoding; a context manager that owns its threads.

    Experts must be asked for in ascending order, each projection once; some may be left out.
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
        self._pool, self._jobs = ThreadPoolExecutor(jobs, thread_name_prefix="requantise"), jobs
        self._waiting = deque(experts)
        self._coming: deque[tuple[int, Future[dict[str, F32]]]] = deque()
        self._held: dict[str, F32] = {}

    def __enter__(self) -> RequantisedLayer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def weight(self, name: str) -> F32:
        """One tensor of the layer, as a reader of the built file would have it."""
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
        payloads = self.encoder.encode_expert(expert, w1, w3, w2)
        out = {p: decoded(payloads[p], self.encoder.formats[p], shapes[p]) for p in PROJECTIONS}
        scale = self.encoder.scale.astype(np.float32)
        out["w1"], out["w3"] = out["w1"] / scale, out["w3"] / scale
        return {expert_name(self.layer, expert, p): w for p, w in out.items()}


class Stored:
    """A source as a recipe stores it."""

    def __init__(self, source: Weights, config: ModelConfig, recipe: Recipe, jobs: int) -> None:
        """Raises RecipeError or WeightError where the recipe cannot store this model."""
        self.source, self.config, self.jobs = source, config, jobs
        self.settings = fit_settings(recipe)
        self.formats = {t.name: t.format for t in plan_tensors(recipe, config)}

    def weight(self, name: str) -> F32:
        """A tensor outside the layers."""
        return plain_weight(self.source, name, self.formats[name], self.settings)

    @one_blas_thread()
    def forward(self, importance: LayerImportance, hidden: Tensor) -> Tensor:
        """The residual stream behind a layer that was encoded under this importance."""
        with RequantisedLayer(
            self.source, self.config, importance, self.formats, self.settings, self.jobs
        ) as weights:
            return layer_forward(weights, self.config, importance.layer, hidden)
