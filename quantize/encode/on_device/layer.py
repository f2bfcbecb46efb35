"""One layer's experts from weights to payloads, where their inputs lie on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ....formats.blocks import Format
from ....formats.checkpoint.source import Source
from ....formats.errors import MqError
from ....formats.minimax import PROJECTIONS, expert_name
from ....kernels.encode.device_encoder import DeviceEncoder
from ....lloyd.hessian.row import RowHessian
from ....verify.model.device_weights import wait_for
from ...spec.calibration_sizes import BESIDE
from ..encoders import Encoder
from ..gpu_encoder import GpuEncoder
from ..layer_encoder import F32, U8, EncodedExpert, LayerEncoder
from ..once import ALONE, Once, attempt, once_for
from ..overflow import check_levels
from ..prepared_layer import ALPHA_GRID, Prepared, some_rows
from .answering import answering_down, product
from .downs import AboveDown, Down, round_downs
from .factors import Factors, factors_of
from .forms import columns_of, folded, unfolded
from .kept import KeptOnDevice
from .moments import rotated_moment
from .rounding import Rounder, Streamed, ThroughMemory, Under, on_stream, unrotated

T = TypeVar("T")


class DeviceLayerEncoder(LayerEncoder):
    """A `LayerEncoder` whose importance is a `KeptOnDevice`."""

    together = BESIDE
    importance: KeptOnDevice

    @classmethod
    def encode_together(
        cls, encoders: Sequence[LayerEncoder], experts: Sequence[int], source: Source
    ) -> list[list[EncodedExpert | MqError]]:
        """As `LayerEncoder.encode_together`; weights that lie on the device are not read again. Downs of all experts
        are rounded side by side: the rows of one that are rounded at a time are few.
        """
        mine = [made for made in encoders if isinstance(made, DeviceLayerEncoder) and made.fit == "hessian"]
        if len(mine) < len(encoders):
            return super().encode_together(encoders, experts, source)
        first: DeviceLayerEncoder = mine[0]

        def above(kept: KeptOnDevice, rounder: Rounder, expert: int) -> list[AboveDown | MqError]:
            weights, once = kept.weights(expert), once_for(mine)
            return [attempt(partial(made.above_down, kept, expert, weights, rounder, once)) for made in mine]

        def work(kept: KeptOnDevice, rounder: Rounder) -> list[list[EncodedExpert | MqError]]:
            begun, once = [above(kept, rounder, expert) for expert in experts], once_for(mine)
            ends = [
                made.with_downs(of_one, kept, rounder, once)
                for made, of_one in zip(mine, zip(*begun, strict=True), strict=True)
            ]
            return [list(done) for done in zip(*ends, strict=True)]

        done = on_device(first.encoder, first.importance, work)
        for expert in experts:
            for projection in PROJECTIONS:
                source.release(expert_name(first.layer, expert, projection))
        return done

    def above_down(
        self,
        kept: KeptOnDevice,
        expert: int,
        weights: Mapping[str, Tensor],
        rounder: Rounder,
        once: Once = ALONE,
    ) -> AboveDown:
        """What `LayerEncoder.encode_expert` does with an expert whose inputs were kept, before its down is rounded."""
        inputs = once.one("inputs", partial(kept.seen, expert))
        fold = self.fold(kept.of(expert, "w2")) if self.settings.fold_down else None
        forms = {p: self.stored.form(p, fold) for p in weights}
        scale = columns_of(forms["w1"], inputs.shape[1], inputs.device)
        above = (*self._basis, self.damping("w1"))

        def hessian_above() -> Factors | RowHessian:
            own = once.one("own", partial(kept.mixed, expert, "w1", inputs))
            return factors_of(rotated_moment(own, self.damping("w1"), scale))

        gate_up = once.one(("gate and up", above), hessian_above)

        def encode(projections: tuple[str, ...]) -> tuple[dict[str, U8], dict[str, Tensor]]:
            """Payloads, and the values that they stand for in the basis of the checkpoint but for the fold."""
            rows = torch.cat([folded(forms[p], weights[p]) for p in projections])
            fmt, under = self.formats[projections[0]], [Under(scale, gate_up)]
            packed, rounded = rounder.encode(rows[None], fmt, under, self.gain)
            values = (unrotated(rounded)[0] / scale).chunk(len(projections))
            payloads = np.split(rounder.fetch(packed)[0], len(projections))
            return dict(zip(projections, payloads, strict=True)), dict(zip(projections, values, strict=True))

        payloads: dict[str, U8] = {}
        values: dict[str, Tensor] = {}
        for projections in _together(self.formats):
            key = (projections, self.formats[projections[0]].name, above)
            packed, stands_for = once.one(key, partial(encode, projections))
            payloads |= packed
            values |= stands_for

        def fit_down() -> tuple[Tensor, Tensor]:
            """The moment of what w2 sees of the rounded matrices, and w2 fitted to that."""
            there = once.one("seen", lambda: product(inputs, weights["w1"], weights["w3"]))
            here = product(inputs, values["w1"], unfolded(forms["w3"], values["w3"]))
            return kept.mixed(expert, "w2", here), answering_down(weights["w2"], there, here)

        rounded = (*above, self.formats["w1"].name, self.formats["w3"].name)
        moment, fitted = once.one(("fitted", rounded), fit_down)
        columns = columns_of(forms["w2"], fitted.shape[1], fitted.device)
        below = (*rounded, self.damping("w2"))
        down = once.one(
            ("down", below), lambda: factors_of(rotated_moment(moment, self.damping("w2"), columns))
        )
        hessians: dict[str, Factors | RowHessian] = {"w1": gate_up, "w3": gate_up, "w2": down}
        notes = {p: h.notes for p, h in hessians.items() if h.notes}
        return AboveDown(expert, payloads, Down(fitted, Under(columns, down)), below, notes)

    def with_downs(
        self, begun: Sequence[AboveDown | MqError], kept: KeptOnDevice, rounder: Rounder, once: Once = ALONE
    ) -> list[EncodedExpert | MqError]:
        """The experts once their downs are rounded; an error stays in its place, and one that prevents the downs in the
        place of each. `once` serves all encoders of the layer, for these experts.
        """
        there = {each.expert: each for each in begun if isinstance(each, AboveDown)}
        keys = {e: ("w2", e, self.formats["w2"].name, each.decided) for e, each in there.items()}

        def encode(missing: Sequence[int]) -> list[U8]:
            return self.round_downs([there[e].down for e in missing], kept, rounder)

        downs = attempt(partial(once.each, keys, encode)) if keys else {}

        def finished(each: AboveDown) -> EncodedExpert:
            if isinstance(downs, MqError):
                raise downs
            payloads = {**each.payloads, "w2": downs[each.expert]}
            for p, payload in payloads.items():
                check_levels(expert_name(self.layer, each.expert, p), self.formats[p], payload)
            return EncodedExpert(payloads, {p: list(notes) for p, notes in each.notes.items()})

        return [each if isinstance(each, MqError) else attempt(partial(finished, each)) for each in begun]

    def round_downs(self, downs: Sequence[Down], kept: KeptOnDevice, rounder: Rounder) -> list[U8]:
        """The payloads of some w2; the rows of each answer each other where it is known how."""
        return round_downs(downs, self.formats["w2"], self.gain, kept.shares, rounder)

    def needs_samples(self) -> list[str]:
        """None: the weights of the layer lie on the device."""
        return []

    def _search(self, samples: Mapping[str, F32], once: Once) -> tuple[dict[float, float], Prepared]:
        """As `LayerEncoder` does it, with all exponents at once and with all sampled rows of a format at once."""
        candidates = [self._candidate(alpha, once) for alpha in ALPHA_GRID]
        losses = once.one(("losses", self._searched), partial(self._losses, candidates))
        return losses, min(candidates, key=lambda candidate: (losses[candidate.alpha], candidate.alpha))

    def _losses(self, candidates: Sequence[Prepared]) -> dict[float, float]:
        rows = {p: self._sampled_rows(p) for p in ("w1", "w3")}
        together = [torch.cat([rows[p] for p in projections]) for projections in _together(self.formats)]
        with ThreadPoolExecutor(len(candidates)) as pool:
            found = pool.map(lambda candidate: self._lost(candidate, together), candidates)
        return dict(zip(ALPHA_GRID, found, strict=True))

    def _sampled_rows(self, projection: str) -> Tensor:
        """Some rows f32 [n, hidden] of the sampled experts' matrices, complete on the first device."""
        names = [expert_name(self.layer, e, projection) for e in self._sampled_experts()]
        given = [self.importance.matrix(name) for name in names]
        full = [m if isinstance(m, Tensor) else m.values() for m in given]
        some = torch.cat([m[some_rows(len(m))].to(self.importance.rows.device) for m in full])
        wait_for(some.device)
        return some

    def _lost(self, candidate: Prepared, together: Sequence[Tensor]) -> float:
        """Share of the output energy that is lost on rows of gate and up under an exponent, those of a format
        `together`.
        """
        form = candidate.stored.form("w1")

        def work(there: KeptOnDevice, rounder: Rounder) -> tuple[float, float]:
            moment = there.gate_up
            scale = columns_of(form, len(moment), moment.device)
            hessian = factors_of(rotated_moment(moment, self.importance.shared.damping, scale))
            lost = kept = torch.zeros((), dtype=torch.float64, device=moment.device)
            for projections, given in zip(_together(self.formats), together, strict=True):
                some = given.to(moment.device)
                fmt, under = self.formats[projections[0]], [Under(scale, hessian)]
                _, values = rounder.encode(some[None], fmt, under, 0.0)
                lost = lost + _energy(unrotated(values)[0] / scale - some, moment)
                kept = kept + _energy(some, moment)
            return float(lost), float(kept)

        lost, kept = on_device(self.encoder, self.importance, work)
        return lost / kept if kept > 0 else 0.0

    def _shared(self, scale: F32) -> None:
        """Every expert has a Hessian of its own, and `_sample_loss` makes one of the layer's on the device."""


def _together(formats: Mapping[str, Format]) -> tuple[tuple[str, ...], ...]:
    """Gate and up as one matrix where they have one format: they share their inputs."""
    return (("w1", "w3"),) if formats["w1"] is formats["w3"] else (("w1",), ("w3",))


def _energy(rows: Tensor, moment: Tensor) -> Tensor:
    """Σ over rows f32 [R, K] of the expected squared output, in f64."""
    x = rows.double()
    return ((x @ moment) * x).sum()


def on_device(encoder: Encoder, kept: KeptOnDevice, work: Callable[[KeptOnDevice, Rounder], T]) -> T:
    """Do some work with what a device has of a layer, in the stream of its encoder that is free next; with an encoder
    without streams, on this thread.
    """
    if not isinstance(encoder, GpuEncoder):
        return work(kept, ThroughMemory(encoder))

    def streamed(there: DeviceEncoder, place: int) -> T:
        here = kept.at(place)
        with torch.inference_mode(), on_stream(there.backend, here.rows.device):
            return work(here, Streamed(there))

    return encoder.on_stream(streamed)
