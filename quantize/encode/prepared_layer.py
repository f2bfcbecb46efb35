"""How one layer's experts are stored: the AWQ scale, chosen from a few sampled matrices where it is not given.

`prepare` comes first. After that nothing changes any more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...awq.importance import Importance, LayerImportance
from ...awq.scale import REFERENCE_ALPHA, gate_up_scale
from ...formats.blocks import F16_FORMAT, Format
from ...formats.hfq.stored import StoredLayer
from ...formats.minimax import ModelConfig, expert_name
from ...lloyd.encode import Fit
from ...lloyd.hessian.row import RowHessian, from_fresh_moment, from_weights
from ..spec.recipe import Recipe
from .encoders import CPU, Encoder, MatrixTask
from .once import ALONE, Once
from .rooms import Rooms

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

ALPHA_GRID = (0.0, 0.15, 0.3, 0.5)
LONE_NOISE = 0.5
"""ρ of `partial_gains` for one expert per token. The noise of k experts averages, so ρ = 0.5 / k.

Measured by divergence: on a dense model 0.5 is the best of 0, 0.3, 0.5, 0.6 and 1.
"""
SAMPLE_EXPERTS = 4
SAMPLE_ROWS = 64


@dataclass(frozen=True)
class FitSettings:
    """How a build encodes: the fit, whether levels get their gain, the AWQ exponent (None: searched in each layer), and
    the exponent of the fold of w2 into w3 (0: none).
    """

    fit: Fit = "hessian"
    gain: bool = True
    awq_alpha: float | None = None
    fold_down: float = 0.0


def fit_settings(recipe: Recipe) -> FitSettings:
    """How a recipe has its tensors encoded."""
    return FitSettings(
        fit=recipe.fit,
        gain=recipe.gain,
        awq_alpha=None if recipe.awq.alpha == "search" else recipe.awq.alpha,
        fold_down=recipe.awq.fold_down,
    )


def hessian_of(importance: Importance, scale: F32 | None, room: F64 | None = None) -> RowHessian:
    """The Hessian of rows that see these inputs divided by scale f32 [K] (None: by ones). It is made in `room` f64 [K²
    or more], of which nothing is kept, or in new memory.
    """
    if importance.moment is None:
        return from_weights(importance.channel_weights(scale))
    return hessian_of_fresh(lambda: importance, scale, room)


def hessian_of_fresh(
    make: Callable[[], Importance], scale: F32 | None, room: F64 | None = None
) -> RowHessian:
    """The same of what `make` gives, with a moment that may lie in `room` too: it is asked anew before each further
    damping.
    """
    return from_fresh_moment(lambda: make().rotated_moment(scale, room=room))


def some_rows(rows: int) -> slice:
    """SAMPLE_ROWS of so many rows, evenly spaced; all of them where there are fewer."""
    step = max(1, rows // SAMPLE_ROWS)
    return slice(0, step * SAMPLE_ROWS, step)


def output_energy(rows: F32, importance: Importance) -> float:
    """Σ over rows f32 [R, K] of the expected squared output, in f64."""
    x = rows.astype(np.float64)
    if importance.moment is None:
        return float((np.square(x) * importance.diagonal).sum())
    return float(((x @ importance.moment) * x).sum())


@dataclass(frozen=True)
class Prepared:
    """What `prepare` chose: the AWQ exponent, the loss of each candidate, the stored form that follows, and the Hessian
    of gate and up where all experts share one moment.
    """

    alpha: float
    losses: Mapping[str, float]
    stored: StoredLayer
    shared: RowHessian | None


class PreparedLayer:
    """The stored form of one layer. First call `prepare`, with the weights that `needs_samples` names.

    Without an importance the fit `hessian` becomes `exact`, the AWQ scale is 1 and nothing is folded.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        importance: LayerImportance | None,
        formats: Mapping[str, Format],
        settings: FitSettings,
        encoder: Encoder = CPU,
    ) -> None:
        self.config = config
        self.layer = layer
        self.importance = importance
        self.formats = dict(formats)
        self.settings = settings
        self.encoder = encoder
        self.fit: Fit = "exact" if importance is None and settings.fit == "hessian" else settings.fit
        self.gain = 1 - LONE_NOISE / config.num_experts_per_tok if settings.gain else 0.0
        self._rooms = Rooms(max(config.hidden_size, config.intermediate_size) ** 2)
        self._ready: Prepared | None = None

    @property
    def _fixed_alpha(self) -> float | None:
        if self.importance is None:
            return 0.0
        if self.settings.awq_alpha is None and self.fit != "hessian":
            return REFERENCE_ALPHA
        return self.settings.awq_alpha

    def needs_samples(self) -> list[str]:
        """Names of the matrices from which the AWQ exponent is searched; none where it is fixed."""
        if self._fixed_alpha is not None:
            return []
        return [expert_name(self.layer, e, p) for e in self._sampled_experts() for p in ("w1", "w3")]

    def _sampled_experts(self) -> list[int]:
        """The layer's first experts, so that a streamed layer needs only its first shard to begin."""
        return list(range(min(SAMPLE_EXPERTS, self.config.num_local_experts)))

    def prepare(self, samples: Mapping[str, F32], once: Once = ALONE) -> None:
        """Choose the AWQ scale; `samples` holds f32 [R, K] weights for every name in `needs_samples`.

        `once` serves all encoders of the layer that have its importance in common.
        """
        fixed = self._fixed_alpha
        if fixed is not None:
            self._ready = self._candidate(fixed, once)
            return
        losses, best = self._search(samples, once)
        shown = {f"{alpha:g}": float(f"{loss:.6g}") for alpha, loss in losses.items()}
        self._ready = Prepared(best.alpha, shown, best.stored, best.shared)

    def _search(self, samples: Mapping[str, F32], once: Once) -> tuple[dict[float, float], Prepared]:
        """The loss of each exponent of ALPHA_GRID, and the layer under the best one, the smaller one of equals."""
        losses: dict[float, float] = {}
        best: Prepared | None = None
        for alpha in ALPHA_GRID:
            candidate = self._candidate(alpha, once)
            losses[alpha] = once.one(
                ("loss", alpha, self._searched), partial(self._sample_loss, candidate, samples, once)
            )
            if best is None or (losses[alpha], alpha) < (losses[best.alpha], best.alpha):
                best = candidate
        assert best is not None
        return losses, best

    @property
    def _searched(self) -> tuple[Hashable, ...]:
        """What decides the loss of an exponent besides what the encoders of a layer have in common."""
        return self.formats["w1"].name, self.formats["w3"].name, self.fit

    def _candidate(self, alpha: float, once: Once) -> Prepared:
        """The layer under one exponent."""
        if self.importance is None or alpha == 0:
            scale = np.ones(self.config.hidden_size, np.float16)
        else:
            scale = gate_up_scale(self.importance.gate_up_energy(), alpha)
        shared = once.one(("shared", alpha, self.fit), lambda: self._shared(scale.astype(np.float32)))
        return Prepared(alpha, {}, StoredLayer(self.formats, scale), shared)

    def _shared(self, scale: F32) -> RowHessian | None:
        """The Hessian of gate and up that all experts share under a scale, where they share one."""
        if self.importance is None or self.importance.shared is None or self.fit != "hessian":
            return None
        return hessian_of(self.importance.shared, scale)

    def _sample_loss(self, candidate: Prepared, samples: Mapping[str, F32], once: Once) -> float:
        """Share of the output energy that is lost on the sampled rows of gate and up under this exponent, f64."""
        assert self.importance is not None
        lost = kept = 0.0
        for e in self._sampled_experts():
            importance = self.importance.shared or self.importance.of(e, "w1")
            scale = candidate.stored.form("w1").scale
            hessian = candidate.shared or once.one(
                ("sampled", e, candidate.alpha), partial(hessian_of, importance, scale)
            )
            for p in ("w1", "w3"):
                form = candidate.stored.form(p)
                full = samples[expert_name(self.layer, e, p)]
                some = full[some_rows(len(full))]
                (payload,) = self.encoder.encode([MatrixTask(some, form, self.fit, hessian)])
                missed = form.format.decode(payload).reshape(some.shape) - form.to_stored(some)
                lost += output_energy(form.from_stored(missed), importance)
                kept += output_energy(some, importance)
        return lost / kept if kept > 0 else 0.0

    @property
    def _prepared(self) -> Prepared:
        if self._ready is None:
            raise RuntimeError("prepare comes first")
        return self._ready

    @property
    def stored(self) -> StoredLayer:
        """How the layer's experts are stored, but for the fold, which is each expert's own."""
        return self._prepared.stored

    @property
    def scale(self) -> F16:
        """The layer's AWQ scale f16 [hidden], as the engine reads it."""
        scale = self.stored.scale
        assert scale is not None
        return scale

    def sidecar(self) -> U8:
        """The payload u8 [2 · hidden] of the layer's AWQ scale tensor."""
        return F16_FORMAT.pack(self.scale.astype(np.float32)).reshape(-1)

    def report(self) -> dict[str, Any]:
        """What `prepare` chose for this layer, as the file's provenance records it: the fit, the AWQ exponent, the loss
        of each candidate, and what the importance had to replace.

        What single experts had to replace is in their `EncodedExpert.notes`.
        """
        prepared = self._prepared
        return {
            "layer": self.layer,
            "fit": self.fit,
            "alpha": prepared.alpha,
            "alpha_losses": dict(prepared.losses),
            "fallbacks": list(self.importance.notes) if self.importance else [],
        }
