"""One layer's experts, from f32 weights to payloads: fold, weigh by importance, encode.

Once the layer's AWQ scale is chosen a `LayerEncoder` does not change any more, so experts can be encoded on any number
of threads with the same bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...awq.importance import Importance, LayerWithRows
from ...awq.own_moments import summed
from ...awq.row_answers import RowAnswers
from ...awq.scale import down_fold
from ...formats.blocks import AffineFormat, LloydFormat
from ...formats.checkpoint.source import Source
from ...formats.errors import MqError, WeightError
from ...formats.fwht import GROUP
from ...formats.hfq.stored import StoredForm
from ...formats.minimax import expert_name
from ...lloyd.hessian.row import RowHessian
from .answering import answering_down, product
from .encoders import MatrixTask
from .once import ALONE, Once, attempt, once_for
from .overflow import check_levels
from .prepared_layer import PreparedLayer, hessian_of, hessian_of_fresh

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

OWN_DAMPING = {4: 0.1, 8: 0.1, 16: 0.05, 64: 0.05}
"""Share of the mean energy that every channel of an expert's own moment gets before it is factored, by the number of
levels: the coarser the levels, the larger the errors, for which a moment of few tokens is trusted too far. Measured by
divergence (docs/quality.md).
"""


@dataclass(frozen=True)
class EncodedExpert:
    """One expert's payloads u8 [bytes] by projection, and, for projections where the Hessian had to replace something
    that it could not use, sentences that say what.
    """

    payloads: Mapping[str, U8]
    notes: Mapping[str, list[str]]


class LayerEncoder(PreparedLayer):
    """Encodes the experts of one layer, once it is prepared."""

    def fold(self, importance: Importance) -> F32 | None:
        """The fold f32 [intermediate] of the expert whose w2 has this importance, None where nothing is folded."""
        return down_fold(importance.diagonal, self.settings.fold_down) if self.settings.fold_down else None

    together: ClassVar[int] = 1
    """The most experts that are encoded at a time."""

    @classmethod
    def encode_together(
        cls, encoders: Sequence[LayerEncoder], experts: Sequence[int], source: Source
    ) -> list[list[EncodedExpert | MqError]]:
        """Encode some experts of a source by several encoders of their layer, which have their importance in common,
        and release their matrices there as soon as they are read: a shard that is held until delivery delays the next
        one's download.

        What the results of an expert have in common is made once. An error as of `encode_expert` stands in the place of
        the result that it prevents; raises those of `Source.weight`.
        """
        return [cls._encode_one(encoders, expert, source) for expert in experts]

    @classmethod
    def _encode_one(
        cls, encoders: Sequence[LayerEncoder], expert: int, source: Source
    ) -> list[EncodedExpert | MqError]:
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
        elif isinstance(self.importance, LayerWithRows):
            with self._rooms.taken() as room:
                payloads, hessians = self._answered(self.importance, expert, weights, forms, once, room)
        else:
            gate_up, down = (self.importance.of(expert, p) for p in ("w1", "w2"))
            above = self._prepared.shared or once.one(
                ("gate and up", basis), lambda: hessian_of(gate_up, forms["w1"].scale)
            )
            below = once.one(("down", basis), lambda: hessian_of(down, fold))
            hessians = {"w1": above, "w3": above, "w2": below}
            payloads = self._encode(weights, forms, hessians, basis, once)
        for p, payload in payloads.items():
            check_levels(names[p], self.formats[p], payload)
        return EncodedExpert(payloads, {p: list(h.notes) for p, h in hessians.items() if h.notes})

    def _answered(
        self,
        importance: LayerWithRows,
        expert: int,
        weights: Mapping[str, F32],
        forms: Mapping[str, StoredForm],
        once: Once,
        room: F64,
    ) -> tuple[dict[str, U8], dict[str, RowHessian]]:
        """Payloads and Hessians of an expert whose inputs were kept: w2 answers the others. Moments and their factors
        are made in `room`.
        """
        inputs = importance.inputs(expert)
        above = (*self._basis, self.damping("w1"))

        def own() -> Importance:
            free = None if once.keeps else room
            made = once.one("own", lambda: importance.from_rows(expert, "w1", inputs, room=free))
            return self._damped("w1", made)

        gate_up = once.one(("gate and up", above), lambda: hessian_of_fresh(own, forms["w1"].scale, room))
        gate_and_up = {p: weights[p] for p in ("w1", "w3")}
        payloads = self._encode(gate_and_up, forms, {"w1": gate_up, "w3": gate_up}, above, once)

        def fit_down() -> tuple[Importance, F32]:
            """What w2 sees of the rounded matrices, and w2 fitted to that."""
            there = once.one("seen", lambda: product(inputs, weights["w1"], weights["w3"]))
            here = product(inputs, *(forms[p].decode(payloads[p], w.shape) for p, w in gate_and_up.items()))
            sums = summed(here)
            own = importance.from_rows(expert, "w2", here, sums)
            return own, answering_down(weights["w2"], there, here, sums)

        rounded = (*above, self.formats["w1"].name, self.formats["w3"].name)
        seen, fitted = once.one(("fitted", rounded), fit_down)
        below = (*rounded, self.damping("w2"))
        down = once.one(
            ("down", below), lambda: hessian_of(self._damped("w2", seen), forms["w2"].scale, room)
        )
        payloads["w2"] = once.one(
            ("w2", self.formats["w2"].name, below),
            lambda: self._encode_down(fitted, forms["w2"], down, importance.answers),
        )
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
        assert isinstance(self.importance, LayerWithRows)
        fmt, form = self.formats["w2"], self.stored.form("w2")
        own = self._damped("w2", self.importance.from_rows(expert, "w2", seen))
        payload = self._encode_down(w2, form, hessian_of(own, form.scale), self.importance.answers)
        check_levels(expert_name(self.layer, expert, "w2"), fmt, payload)
        return payload

    def _encode_down(self, w2: F32, form: StoredForm, hessian: RowHessian, answers: RowAnswers | None) -> U8:
        """The payload u8 [bytes] of w2 f32 [hidden, intermediate], whose rows answer each other as `answers` says."""
        task = MatrixTask(w2, form, self.fit, hessian, self.gain, answers=answers)
        return self.encoder.encode([task])[0]
