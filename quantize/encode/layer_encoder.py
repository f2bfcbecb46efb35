"""One layer's experts from f32 weights to payloads: scale, fold, rotate, round, pack.

A `LayerEncoder` fixes the layer's AWQ scale from a sample and is read-only from then on, so experts can be encoded on
any number of threads with the same bytes. Depends on awq, lloyd and formats.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ...awq.importance import Importance, LayerImportance
from ...awq.scale import REFERENCE_ALPHA, down_fold, gate_up_scale
from ...formats.blocks import F16_FORMAT, Format
from ...formats.errors import WeightError
from ...formats.fwht import GROUP, rotate, unrotate
from ...formats.minimax import ModelConfig, expert_name
from ...lloyd.encode import Fit, encode_plain, encode_rotated
from ...lloyd.hessian.row import RowHessian, from_moment, from_weights
from ..spec.recipe import Recipe

__all__ = ["FitSettings", "LayerEncoder", "encode_plain"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

ALPHA_GRID = (0.0, 0.15, 0.3, 0.5)
LONE_NOISE = 0.5
"""Share of a matrix's rounding noise that counts in its gain where a token takes one expert; k average it to 1/k.

Measured by divergence: on a dense model, one half is the best of 0, 0.3, 0.5, 0.6 and 1.
"""
SAMPLE_EXPERTS = 4
SAMPLE_ROWS = 64


@dataclass(frozen=True)
class FitSettings:
    """How a build encodes: the fit, the gain of levels, the AWQ exponent (None: searched per layer), the folded down
    scale's exponent.
    """

    fit: Fit = "hessian"
    gain: bool = True
    awq_alpha: float | None = None
    fold_down: float = 0.0


def fit_settings(recipe: Recipe) -> FitSettings:
    """How a recipe has its experts encoded."""
    return FitSettings(
        fit=recipe.fit,
        gain=recipe.gain,
        awq_alpha=None if recipe.awq.alpha == "search" else recipe.awq.alpha,
        fold_down=recipe.awq.fold_down,
    )


class Hessian(Protocol):
    """What a coder makes of an importance, and takes back; `notes` says what had to fall back."""

    @property
    def notes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class MatrixTask:
    """A matrix to be encoded: weights f32 [R, K], multiplied by scale f32 [K], in a rotated format."""

    weights: F32
    fmt: Format
    fit: Fit
    scale: F32 | None
    hessian: Hessian | None
    gain: float


class Coder(Protocol):
    """Who encodes matrices: the CPU, or a device; the bytes are the same. Safe for several threads."""

    @property
    def device(self) -> str:
        """In words, for reports."""
        ...

    def hessian(self, importance: Importance, scale: F32 | None) -> Hessian:
        """The Hessian of the rows that see these inputs divided by scale f32 [K]."""
        ...

    def encode(self, tasks: Sequence[MatrixTask]) -> list[U8]:
        """Payloads u8 [bytes] of some matrices, whose Hessians this coder made."""
        ...


class CpuCoder:
    """Encodes on the thread that asks."""

    device = "cpu"

    def hessian(self, importance: Importance, scale: F32 | None) -> Hessian:
        return row_hessian(importance, scale)

    def encode(self, tasks: Sequence[MatrixTask]) -> list[U8]:
        return [
            encode_matrix(t.weights, t.fmt, t.fit, t.scale, cast(RowHessian | None, t.hessian), t.gain)
            for t in tasks
        ]


CPU = CpuCoder()


def encode_matrix(
    weights: F32, fmt: Format, fit: Fit, scale: F32 | None, hessian: RowHessian | None, gain: float
) -> U8:
    """Payload u8 [bytes] of one expert matrix f32 [R, K]: multiplied by scale f32 [K] along K, rotated, encoded."""
    scaled = weights if scale is None else weights * scale[None, :]
    return encode_rotated(rotate(scaled), fmt, fit, hessian, gain)


def row_hessian(importance: Importance, scale: F32 | None) -> RowHessian:
    """The Hessian of the rows that see these inputs divided by scale f32 [K]."""
    if importance.moment is None:
        return from_weights(importance.channel_weights(scale))
    return from_moment(importance.rotated_moment(scale))


def output_energy(rows: F32, importance: Importance) -> float:
    """Σ over rows f32 [R, K] of the expected squared output, in f64."""
    x = rows.astype(np.float64)
    if importance.moment is None:
        return float((np.square(x) * importance.diagonal).sum())
    return float(((x @ importance.moment) * x).sum())


class LayerEncoder:
    """Encodes the experts of one layer; `prepare` first, with the weights that `needs_samples` names.

    Without an importance the fit `hessian` becomes `exact` and the AWQ scale is 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        importance: LayerImportance | None,
        formats: Mapping[str, Format],
        settings: FitSettings,
        coder: Coder = CPU,
    ) -> None:
        self.config = config
        self.layer = layer
        self.importance = importance
        self.formats = dict(formats)
        self.settings = settings
        self.coder = coder
        self.fit: Fit = "exact" if importance is None and settings.fit == "hessian" else settings.fit
        self._alpha = self._fixed_alpha()
        self._gain = 1 - LONE_NOISE / config.num_experts_per_tok if settings.gain else 0.0
        self._objective: dict[str, float] = {}
        self._scale: NDArray[np.float16] | None = None
        self._shared: tuple[Any, float | None, Hessian] | None = None
        self._lock = threading.Lock()
        self._notes: dict[int, dict[str, list[str]]] = {}

    def _fixed_alpha(self) -> float | None:
        if self.importance is None:
            return 0.0
        if self.settings.awq_alpha is None and self.fit != "hessian":
            return REFERENCE_ALPHA
        return self.settings.awq_alpha

    def needs_samples(self) -> list[str]:
        """Names of the matrices from which the AWQ exponent is searched; none where it is fixed."""
        if self._alpha is not None:
            return []
        return [expert_name(self.layer, e, p) for e in self._sampled_experts() for p in ("w1", "w3")]

    def _sampled_experts(self) -> list[int]:
        """The layer's first experts, so that a streamed layer needs only its first shard to begin."""
        return list(range(min(SAMPLE_EXPERTS, self.config.num_local_experts)))

    def prepare(self, samples: Mapping[str, F32]) -> None:
        """Fix the AWQ scale; `samples` holds f32 weights for every name in `needs_samples`."""
        if self._alpha is None:
            losses = {a: self._sample_loss(a, samples) for a in ALPHA_GRID}
            self._objective = {f"{a:g}": float(f"{loss:.6g}") for a, loss in losses.items()}
            self._alpha = min(losses, key=lambda a: (losses[a], a))
        self._scale = self._scale_at(self._alpha)

    def _gate_up_hessian(self, importance: Importance, scale: F32, alpha: float | None) -> Hessian:
        """The Hessian at gate and up; one that all experts share is factored once per exponent, before they are
        encoded.
        """
        if importance.moment is None:
            return self.coder.hessian(importance, scale)
        with self._lock:
            if self._shared is None or self._shared[0] is not importance.moment or self._shared[1] != alpha:
                self._shared = (importance.moment, alpha, self.coder.hessian(importance, scale))
            return self._shared[2]

    def _scale_at(self, alpha: float) -> NDArray[np.float16]:
        if self.importance is None or alpha == 0:
            return np.ones(self.config.hidden_size, np.float16)
        return gate_up_scale(self.importance.gate_up_energy(), alpha)

    def _sample_loss(self, alpha: float, samples: Mapping[str, F32]) -> float:
        """Share of the output energy lost on the sampled rows of gate and up under this exponent, f64."""
        assert self.importance is not None
        scale = self._scale_at(alpha).astype(np.float32)
        lost = kept = 0.0
        for e in self._sampled_experts():
            importance = self.importance.of(e, "w1")
            hessian = self._gate_up_hessian(importance, scale, alpha)
            for p in ("w1", "w3"):
                full = samples[expert_name(self.layer, e, p)]
                some = full[:: max(1, len(full) // SAMPLE_ROWS)][:SAMPLE_ROWS]
                rows = rotate(some * scale[None, :])
                fmt = self.formats[p]
                (payload,) = self.coder.encode([MatrixTask(some, fmt, self.fit, scale, hessian, gain=0)])
                coded = fmt.decode(payload)
                error = unrotate(coded.reshape(rows.shape) - rows) / scale[None, :]
                lost += output_energy(error, importance)
                kept += output_energy(some, importance)
        return lost / kept if kept > 0 else 0.0

    @property
    def scale(self) -> NDArray[np.float16]:
        """The layer's AWQ scale f16 [hidden], as the runtime reads it."""
        if self._scale is None:
            raise RuntimeError("LayerEncoder.prepare comes first")
        return self._scale

    def sidecar(self) -> U8:
        """The payload of the layer's AWQ scale tensor."""
        return F16_FORMAT.pack(self.scale.astype(np.float32)).reshape(-1)

    def encode_expert(self, expert: int, w1: F32, w3: F32, w2: F32) -> dict[str, U8]:
        """Payloads u8 [bytes] of one expert's matrices f32, by projection; thread-safe, a pure function of its
        inputs."""
        for projection, w in (("w1", w1), ("w3", w3), ("w2", w2)):
            if w.shape[1] % GROUP:
                raise WeightError(
                    f"has {w.shape[1]} columns, which is not a multiple of {GROUP}",
                    tensor=expert_name(self.layer, expert, projection),
                )
        scale = self.scale.astype(np.float32)
        fold: F32 | None = None
        gate_up = down = None
        if self.importance is not None:
            of_down = self.importance.of(expert, "w2")
            if self.settings.fold_down and self.fit == "hessian":
                fold = down_fold(of_down.diagonal, self.settings.fold_down)
                w3 = w3 / fold[:, None]
            if self.fit == "hessian":
                gate_up = self._gate_up_hessian(self.importance.of(expert, "w1"), scale, self._alpha)
                down = self.coder.hessian(of_down, fold)
        plan = (("w1", w1, scale, gate_up), ("w3", w3, scale, gate_up), ("w2", w2, fold, down))
        self._notes[expert] = {p: list(h.notes) for p, _, _, h in plan if h is not None and h.notes}
        tasks = [MatrixTask(w, self.formats[p], self.fit, s, h, self._gain) for p, w, s, h in plan]
        return dict(zip((p for p, _, _, _ in plan), self.coder.encode(tasks), strict=True))

    def notes(self, expert: int) -> dict[str, list[str]]:
        """What the rounding of an expert, once it is encoded, had to fall back on, by projection."""
        return self._notes.get(expert, {})

    def report(self) -> dict[str, Any]:
        """What `prepare` decided for this layer: the fit, the AWQ exponent, its candidates' losses, the fallbacks.

        What single experts fell back on is in their `notes`.
        """
        return {
            "layer": self.layer,
            "fit": self.fit,
            "alpha": self._alpha,
            "alpha_losses": self._objective,
            "fallbacks": list(self.importance.fallbacks) if self.importance else [],
        }
