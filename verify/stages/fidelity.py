"""Stage 4: every stored tensor against the dequantised source: weight SNR, output-weighted SNR, and the slope.

Output-weighted energies count each input channel with its E[x²] from the imatrix: Σ d·(w − ŵ)² is the expected error
of the output. The slope of ŵ on w, weighted too, is 1 but for the encoder's shrinkage; swapped tensors have a slope of
0, and a wrong scale shows in the slope directly. The bounds below only tell faults from noise; quality is judged by the
stage predictions. Zeros that equal the source's zeros prove nothing and are not scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.hfq import HfqFile, TensorEntry
from ...formats.hfq.provenance import Provenance
from ...formats.hfq.stored import RecoveredFolds, folds_down, format_of
from ...formats.minimax import ModelConfig, TensorSpec, awq_scale_name, inventory
from ...formats.statistics.imatrix import Imatrix, expert_entry
from ..model.hfq_weights import DecodedFile
from ..model.metrics import snr_db
from ..model.reference import Weights, blocks
from .stage import StageResult

F32 = NDArray[np.float32]
FLOORS: Mapping[str, float] = {
    "F32": 140.0,
    "F16": 50.0,
    "Q8F16": 30.0,
    "MQ6": 20.0,
    "MQ4": 9.0,
    "MQ4-Lloyd": 9.0,
    "MQ3-Lloyd": 5.0,
    "MQ2-Lloyd": 1.0,
}
"""Output-weighted SNR (dB): a tensor of this format with less has a fault, not noise."""
SLOPES: Mapping[str, tuple[float, float]] = {"MQ2-Lloyd": (0.8, 1.12), "MQ3-Lloyd": (0.92, 1.06)}
"""Bounds of a tensor's slope. Without the gain, 2 bits shrink a tensor to a slope of about 0.89, 3 bits to 0.97."""
SLOPE = (0.97, 1.03)
"""The bounds for all other formats."""
TUNED_FLOORS: Mapping[str, float] = {**FLOORS, "F16": 20.0, "Q8F16": 20.0}
TUNED_SLACK = 0.05
"""Tuning moves norms, attention and levels away from the source's on purpose. In layers that the file says are tuned,
only gross faults are looked for here, under these floors and with slopes so much wider; what comes out of the layers is
judged by the stage predictions."""


@dataclass(frozen=True)
class Fidelity:
    """Energies of one tensor, or of several together: plain, and weighted by E[x²] of the inputs."""

    signal: float
    noise: float
    weighted_signal: float
    weighted_noise: float
    weighted_product: float

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def snr(self) -> float:
        """Signal to noise of the weights, in dB."""
        return snr_db(self.signal, self.noise)

    @property
    def output_snr(self) -> float:
        """Signal to noise of the output, in dB."""
        return snr_db(self.weighted_signal, self.weighted_noise)

    @property
    def only_zeros(self) -> bool:
        """Whether both sides hold nothing but zeros, so that their ratio says nothing."""
        return self.signal == 0 and self.noise == 0

    @property
    def slope(self) -> float:
        """⟨w, ŵ⟩ / ⟨w, w⟩; 1 for a tensor of zeros that stayed so."""
        if self.weighted_signal == 0:
            return 1.0 if self.weighted_noise == 0 else float("inf")
        return self.weighted_product / self.weighted_signal


ROWS = 1 << 22
"""Weights that are compared at a time."""


def measure(source: F32, decoded: F32, importance: F32 | None) -> Fidelity:
    """Compare a tensor f32 [R, K] or [K] with what the file makes of it, f32 of the same shape.

    `importance` f32 [K] is E[x²] of the inputs; without it all channels weigh the same.
    """
    a, b = np.atleast_2d(source), np.atleast_2d(decoded)
    weight = np.ones(a.shape[1]) if importance is None else importance.astype(np.float64)
    columns = np.zeros((3, a.shape[1]))
    step = max(1, ROWS // a.shape[1])
    for start in range(0, len(a), step):
        w, q = (part[start : start + step].astype(np.float64) for part in (a, b))
        columns += np.stack([(w * w).sum(0), ((w - q) ** 2).sum(0), (w * q).sum(0)])
    plain, weighted = columns.sum(1), columns @ weight
    return Fidelity(plain[0], plain[1], weighted[0], weighted[1], weighted[2])


class ChannelImportance:
    """E[x²] of every expert's inputs, read from an imatrix one layer and projection at a time."""

    def __init__(self, imatrix: Imatrix | None, cfg: ModelConfig) -> None:
        self.imatrix, self.cfg = imatrix, cfg
        self._at: tuple[int, str] | None = None
        self._rows: F32 | None = None

    def of(self, spec: TensorSpec) -> F32 | None:
        """E[x²] f32 [K]: the expert's own where it saw tokens, else the layer's mean; None where nothing is known."""
        if self.imatrix is None or spec.layer is None or spec.expert is None or spec.projection is None:
            return None
        if self._at != (spec.layer, spec.projection):
            self._at = (spec.layer, spec.projection)
            self._rows = self._filled(self.imatrix, spec.layer, spec.projection)
        return None if self._rows is None else self._rows[spec.expert]

    def _filled(self, imatrix: Imatrix, layer: int, projection: str) -> F32 | None:
        entry = expert_entry(imatrix, layer, projection, self.cfg.num_local_experts)
        if entry is None or len(entry.sum2_mean) != self.cfg.num_local_experts:
            return None
        good = np.isfinite(entry.sum2_mean) & (entry.sum2_mean >= 0)
        good &= (entry.sum2_mean > 0).any(axis=1, keepdims=True)
        total = np.where(good, entry.sum2_mean, np.float32(0)).sum(axis=0, dtype=np.float64)
        mean = total / np.maximum(good.sum(axis=0), 1)
        return np.where(good, entry.sum2_mean, mean).astype(np.float32) if mean.any() else None


@dataclass(frozen=True)
class ProjectionFidelity:
    """All tensors of one projection in one layer together (`layer` is None outside the layers), and the worst of them.

    SNRs are in dB; those named output and worst count each channel with its E[x²].
    """

    layer: int | None
    projection: str
    format: str
    tensors: int
    snr_db: float
    output_snr_db: float
    slope: float
    worst_db: float
    worst: str


@dataclass(frozen=True)
class FidelityFigures:
    """Every projection of every layer; `weighted` says whether an imatrix gave the channels' weights."""

    weighted: bool
    rows: tuple[ProjectionFidelity, ...]

    def as_json(self) -> dict[str, Any]:
        return {"weighted": self.weighted, "rows": [asdict(row) for row in self.rows]}


class FidelityCheck:
    """Measures tensors one after the other, as the source gives them; `tensors` limits what is looked at.

    A tensor under its format's floor is a problem, and so is one of nothing but zeros, but for a routing bias: a fresh
    model's may be zero. Such a bias is noted and not scored.
    """

    def __init__(
        self,
        file: HfqFile,
        source: Weights,
        cfg: ModelConfig,
        imatrix: Imatrix | None,
        tensors: Sequence[TensorEntry] | None = None,
    ) -> None:
        self._file, self._source, self._stored = file, source, DecodedFile(file)
        self._chosen = {entry.name for entry in (file.entries if tensors is None else tensors)}
        self._weighted, self._importance = imatrix is not None, ChannelImportance(imatrix, cfg)
        self._tuned = Provenance.of(file).tuned_layers
        self._folds = RecoveredFolds(source.weight, self._stored.weight) if folds_down(file) else None
        self._problems: list[str] = []
        self._rows: dict[tuple[int, str], _Row] = {}
        self._seen = self._zero_biases = 0

    def looks_at(self, spec: TensorSpec) -> bool:
        """Whether the tensor is one of those that are measured."""
        return spec.name in self._chosen and spec.name in self._file

    def add(self, spec: TensorSpec) -> None:
        """Measure one tensor; its weights must be at hand."""
        entry, parts = self._file.entry(spec.name), []
        if entry.shape != spec.shape:
            self._problems.append(
                f"{spec.name}: has shape {list(entry.shape)}, the config calls for {list(spec.shape)}"
            )
            return
        for weight, decoded in _pairs(self._stored, self._source, spec, self._folds):
            if weight.shape != decoded.shape:
                self._problems.append(
                    f"{spec.name}: has shape {list(decoded.shape)}, the source {list(weight.shape)}"
                )
                return
            parts.append(measure(weight, decoded, self._importance.of(spec)))
        fidelity, fmt = reduce(add, parts), format_of(self._file, entry).name
        self._seen += 1
        if fidelity.only_zeros and spec.role == "bias":
            self._zero_biases += 1
            return
        found = _problems(fidelity, fmt, _sidecar(self._file, spec), spec.layer in self._tuned)
        self._problems += [f"{spec.name}: {text}" for text in found]
        key = (-1 if spec.layer is None else spec.layer, _projection(spec))
        self._rows.setdefault(key, _Row(fmt)).add(spec.name, fidelity)

    def result(self) -> StageResult:
        """The stage, of all tensors that were measured."""
        table = tuple(
            row.done(None if layer < 0 else layer, projection)
            for (layer, projection), row in sorted(self._rows.items())
        )
        notes = []
        if self._zero_biases:
            notes.append(
                f"{self._zero_biases} routing biases hold only zeros, as in the source; they are not scored"
            )
        if self._tuned:
            notes.append(
                f"{len(self._tuned)} layers were tuned, so that their weights differ from the source's on purpose: "
                "look at what the stage predictions says of their outputs"
            )
        figures = FidelityFigures(self._weighted, table)
        return StageResult("fidelity", self._seen, "tensors", tuple(self._problems), tuple(notes), figures)


def check_fidelity(
    file: HfqFile,
    source: Weights,
    cfg: ModelConfig,
    imatrix: Imatrix | None,
    tensors: Sequence[TensorEntry] | None = None,
) -> StageResult:
    """Measure all of the file's tensors, or only `tensors`."""
    check = FidelityCheck(file, source, cfg, imatrix, tensors)
    for spec in filter(check.looks_at, inventory(cfg)):
        check.add(spec)
    return check.result()


def _pairs(
    stored: DecodedFile, source: Weights, spec: TensorSpec, folds: RecoveredFolds | None
) -> Iterator[tuple[F32, F32]]:
    """A tensor of the source and of the file, both f32 in the checkpoint's basis: whole, or by rows where it is the
    vocabulary's.
    """
    name = spec.name
    if spec.role in ("embed", "lm_head"):
        for low, weight in blocks(source, name, spec.shape[0]):
            yield weight, stored.rows(name, low, min(low + len(weight), stored.file.entry(name).shape[0]))
        return
    shape = stored.file.entry(name).shape
    yield source.weight(name), stored.weight(name, folds.of(name, shape) if folds else None)


def _sidecar(file: HfqFile, spec: TensorSpec) -> str | None:
    """The AWQ scale that a matrix is divided by, if the file has one."""
    if spec.layer is None or spec.projection not in ("w1", "w3"):
        return None
    name = awq_scale_name(spec.layer)
    return name if name in file else None


def _projection(spec: TensorSpec) -> str:
    if spec.projection:
        return spec.projection
    name = spec.name.removesuffix(".weight")
    return name.split(".", 3)[3] if spec.layer is not None else name


def _problems(fidelity: Fidelity, fmt: str, sidecar: str | None, tuned: bool) -> Iterator[str]:
    where = f" (its scale is {sidecar})" if sidecar else ""
    floor, slack = (TUNED_FLOORS[fmt], TUNED_SLACK) if tuned else (FLOORS[fmt], 0.0)
    low, high = SLOPES.get(fmt, SLOPE)
    if fidelity.only_zeros:
        yield (
            "holds only zeros, and so does the source: a matrix or norm of zeros is a hole in the checkpoint;"
            " fetch its shard again, and build again"
        )
    elif not fidelity.output_snr >= floor:
        yield (
            f"{fmt} against the source has an SNR of {fidelity.output_snr:.1f} dB, under {floor:.0f} dB:"
            f" these are not the source's weights{where}"
        )
    elif not low - slack <= fidelity.slope <= high + slack:
        yield f"its values are {fidelity.slope:.3f} times the source's: a scale is off{where}"


@dataclass
class _Row:
    """One projection of one layer: all its tensors together, and the worst of them."""

    fmt: str
    total: Fidelity | None = None
    worst: tuple[float, str] = (float("inf"), "")
    tensors: int = 0

    def add(self, name: str, fidelity: Fidelity) -> None:
        self.total = fidelity if self.total is None else self.total + fidelity
        self.worst = min(self.worst, (fidelity.output_snr, name))
        self.tensors += 1

    def done(self, layer: int | None, projection: str) -> ProjectionFidelity:
        assert self.total is not None
        return ProjectionFidelity(
            layer=layer,
            projection=projection,
            format=self.fmt,
            tensors=self.tensors,
            snr_db=round(self.total.snr, 2),
            output_snr_db=round(self.total.output_snr, 2),
            slope=round(float(self.total.slope), 5),
            worst_db=round(self.worst[0], 2),
            worst=self.worst[1],
        )
