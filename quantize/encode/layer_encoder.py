"""One layer's experts, from f32 weights to payloads: choose the AWQ scale, fold, weigh by importance, encode.

`prepare` chooses the layer's AWQ scale from a few sampled matrices. After that a `LayerEncoder` does not change any
more, so experts can be encoded on any number of threads with the same bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...awq.importance import Importance, LayerImportance
from ...awq.scale import REFERENCE_ALPHA, down_fold, gate_up_scale
from ...formats.blocks import F16_FORMAT, AffineFormat, Format, LloydFormat
from ...formats.checkpoint.source import Source
from ...formats.errors import MqError, WeightError
from ...formats.fwht import GROUP
from ...formats.hfq.stored import StoredForm, StoredLayer
from ...formats.minimax import ModelConfig, expert_name
from ...lloyd.encode import Fit
from ...lloyd.hessian.row import RowHessian, from_moment, from_weights
from ..spec.recipe import Recipe
from .answering import answering_down, product
from .encoders import CPU, Encoder, MatrixTask
from .once import ALONE, Once, attempt, once_for
from .overflow import check_levels

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

ALPHA_GRID = (0.0, 0.15, 0.3, 0.5)
LONE_NOISE = 0.5
"""ρ of `partial_gains` for one expert per token. The noise of k experts averages, so ρ = 0.5 / k.

Measured by divergence: on a dense model 0.5 is the best of 0, 0.3, 0.5, 0.6 and 1.
"""
OWN_DAMPING = {4: 0.1, 8: 0.1, 16: 0.05, 64: 0.05}
"""Share of the mean energy that every channel of an expert's own moment gets before it is factored, by the number of
levels: the coarser the levels, the larger the errors, for which a moment of few tokens is trusted too far. Measured by
divergence (docs/quality.md).
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


def hessian_of(importance: Importance, scale: F32 | None) -> RowHessian:
    """The Hessian of rows that see these inputs divided by scale f32 [K] (None: by ones)."""
    if importance.moment is None:
        return from_weights(importance.channel_weights(scale))
    return from_moment(importance.rotated_moment(scale))


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
class EncodedExpert:
    """One expert's payloads u8 [bytes] by projection, and, for projections where the Hessian had to replace something
    that it could not use, sentences that say what.
    """

    payloads: Mapping[str, U8]
    notes: Mapping[str, list[str]]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` chose: the AWQ exponent, the loss of each candidate, the stored form that follows, and the Hessian
    of gate and up where all experts share one moment.
    """

    alpha: float
    losses: Mapping[str, float]
    stored: StoredLayer
    shared: RowHessian | None


class LayerEncoder:
    """Encodes the experts of one layer. First call `prepare`, with the weights that `needs_samples` names.

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
            raise RuntimeError("LayerEncoder.prepare comes first")
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

    def fold(self, importance: Importance) -> F32 | None:
        """The fold f32 [intermediate] of the expert whose w2 has this importance, None where nothing is folded."""
        return down_fold(importance.diagonal, self.settings.fold_down) if self.settings.fold_down else None

    @classmethod
    def encode_together(
        cls, encoders: Sequence[LayerEncoder], expert: int, source: Source
    ) -> list[EncodedExpert | MqError]:
        """Encode one expert of a source by several encoders of its layer, which have their importance in common, and
        release its matrices there as soon as they are read: a shard that is held until delivery delays the next one's
        download.

        What the results have in common is made once. An error as of `encode_expert` stands in the place of the result
        that it prevents; raises those of `Source.weight`.
        """
        names = [expert_name(encoders[0].layer, expert, p) for p in ("w1", "w3", "w2")]
        w1, w3, w2 = (source.weight(name) for name in names)
        for name in names:
            source.release(name)
        once = once_for(encoders)
        return [attempt(partial(made.encode_expert, expert, w1, w3, w2, once)) for made in encoders]

    def encode_expert(self, expert: int, w1: F32, w3: F32, w2: F32, once: Once = ALONE) -> EncodedExpert:
        """Encode one expert's matrices f32: w1 and w3 [intermediate, hidden], w2 [hidden, intermediate].

        Where the expert's inputs were kept, w1 and w3 are rounded under their own moment, and w2 is fitted to what they
        then give it and rounded under the moment of that.
        A pure function of its arguments, for any number of threads; `once` serves all encoders of the layer that have
        its importance in common, for this expert. Raises WeightError, which names the matrix, where its width is no
        multiple of 256 or its levels are beyond what the format stores.
        """
        weights = {"w1": w1, "w3": w3, "w2": w2}
        names = {p: expert_name(self.layer, expert, p) for p in weights}
        for p, w in weights.items():
            if w.shape[1] % GROUP:
                raise WeightError(
                    f"has {w.shape[1]} columns, which is not a multiple of {GROUP}", tensor=names[p]
                )
        fold = None
        if self.importance is not None and self.settings.fold_down:
            fold = self.fold(self.importance.of(expert, "w2"))
        forms = {p: self._prepared.stored.form(p, fold) for p in weights}
        basis = self._basis
        if self.importance is None or self.fit != "hessian":
            hessians: dict[str, RowHessian] = {}
            payloads = self._encode(weights, forms, hessians, basis, once)
        elif (inputs := self.importance.inputs(expert)) is None:
            gate_up, down = (self.importance.of(expert, p) for p in ("w1", "w2"))
            above = self._prepared.shared or once.one(
                ("gate and up", basis), lambda: hessian_of(gate_up, forms["w1"].scale)
            )
            below = once.one(("down", basis), lambda: hessian_of(down, fold))
            hessians = {"w1": above, "w3": above, "w2": below}
            payloads = self._encode(weights, forms, hessians, basis, once)
        else:
            payloads, hessians = self._answered(self.importance, expert, weights, forms, inputs, once)
        for p, payload in payloads.items():
            check_levels(names[p], self.formats[p], payload)
        return EncodedExpert(payloads, {p: list(h.notes) for p, h in hessians.items() if h.notes})

    def _answered(
        self,
        importance: LayerImportance,
        expert: int,
        weights: Mapping[str, F32],
        forms: Mapping[str, StoredForm],
        inputs: F32,
        once: Once,
    ) -> tuple[dict[str, U8], dict[str, RowHessian]]:
        """Payloads and Hessians of an expert that saw these inputs f32 [n, hidden]: w2 answers the others."""
        above = (*self._basis, self.damping("w1"))

        def hessian_above() -> RowHessian:
            own = once.one("own", lambda: importance.from_rows(expert, "w1", inputs))
            return hessian_of(self._damped("w1", own), forms["w1"].scale)

        gate_up = once.one(("gate and up", above), hessian_above)
        gate_and_up = {p: weights[p] for p in ("w1", "w3")}
        payloads = self._encode(gate_and_up, forms, {"w1": gate_up, "w3": gate_up}, above, once)

        def fit_down() -> tuple[Importance, F32]:
            """What w2 sees of the rounded matrices, and w2 fitted to that."""
            there = once.one("seen", lambda: product(inputs, weights["w1"], weights["w3"]))
            here = product(inputs, *(forms[p].decode(payloads[p], w.shape) for p, w in gate_and_up.items()))
            return importance.from_rows(expert, "w2", here), answering_down(weights["w2"], there, here)

        rounded = (*above, self.formats["w1"].name, self.formats["w3"].name)
        seen, fitted = once.one(("fitted", rounded), fit_down)
        below = (*rounded, self.damping("w2"))
        down = once.one(("down", below), lambda: hessian_of(self._damped("w2", seen), forms["w2"].scale))
        payloads |= self._encode({"w2": fitted}, forms, {"w2": down}, below, once)
        return payloads, {"w1": gate_up, "w3": gate_up, "w2": down}

    @property
    def _basis(self) -> tuple[Hashable, ...]:
        """What decides how an expert's matrices are stored and rounded, but for their formats and importance."""
        return self._prepared.alpha, self.settings.fold_down, self.fit, self.gain

    def damping(self, projection: str) -> float:
        """How an expert's own moment of this matrix's inputs is damped, as its format asks for."""
        fmt = self.formats[projection]
        assert isinstance(fmt, LloydFormat | AffineFormat)
        return OWN_DAMPING[fmt.levels]

    def _damped(self, projection: str, own: Importance) -> Importance:
        return replace(own, damping=self.damping(projection))

    def _encode(
        self,
        weights: Mapping[str, F32],
        forms: Mapping[str, StoredForm],
        hessians: Mapping[str, RowHessian],
        decided: tuple[Hashable, ...],
        once: Once,
    ) -> dict[str, U8]:
        """The payloads u8 [bytes] of some matrices of one expert; `decided` is what decides them beside the formats."""

        def task(p: str) -> MatrixTask:
            stored = partial(once.one, ("stored", p, decided), partial(forms[p].to_stored, weights[p]))
            return MatrixTask(weights[p], forms[p], self.fit, hessians.get(p), self.gain, stored)

        def encode(missing: Sequence[str]) -> list[U8]:
            return self.encoder.encode([task(p) for p in missing])

        return once.each({p: (p, self.formats[p].name, decided) for p in weights}, encode)

    def encode_down(self, expert: int, w2: F32, seen: F32) -> U8:
        """The payload u8 [bytes] of w2 f32 [hidden, intermediate] alone, rounded under the moment of its inputs `seen`
        f32 [n, intermediate], as `encode_expert` does with w2 that it has fitted to them. Nothing is folded.
        """
        assert self.importance is not None
        fmt, form = self.formats["w2"], self.stored.form("w2")
        own = self._damped("w2", self.importance.from_rows(expert, "w2", seen))
        task = MatrixTask(w2, form, self.fit, hessian_of(own, form.scale), self.gain)
        (payload,) = self.encoder.encode([task])
        check_levels(expert_name(self.layer, expert, "w2"), fmt, payload)
        return payload

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
