"""One layer's tuning: what is continuous in it is trained so that its output comes near that of the source's layer.

Inputs are what the file's own layers before it put out, targets what the source's layers put out, so each layer also
answers the errors of those before it. A share of the sequences is held out. A layer whose error on them does not fall,
measured on payloads as they would be stored, keeps the form that it had.

The router stays: training moves its logits, and near ties tokens then take other experts than in the source. At 2 bits
that gave nothing, at 4 bits it cost one per cent of KLD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.blocks import AffineFormat, FloatFormat, LloydFormat, Q8Format
from ...formats.machine import cores
from ...formats.minimax import ModelConfig, awq_scale_name, expert_name, layer_inventory
from ..encode.on_device.transfer import fetch, fetched
from ..encode.overflow import encode_tensor
from ..spec.efforts import EPOCHS
from .deterministic import coarse_products, deterministic, step_dtype
from .rounding import with_heads, within_f16, within_scales
from .stream import Stream
from .student import Matrices, StoredTensor, Student

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
CPU = torch.device("cpu")
BETAS = (0.9, 0.999)
EPSILON = 1e-12
"""The least that Adam divides by. Else it is the RMS of the first gradients of a tensor: what few tokens reach, such as
an expert that the text hardly needs, then moves less than the rest. Without that, text of one kind costs others.
"""
OUTLIER = 10.0
"""An error at one held-out token counts as at most this many times the median one. Where two experts tie, rounding lets
a token take another expert than in the source, and a single such token can weigh as much as a hundred others.
"""
FEW_STEPS = 100
"""Six epochs of 65,536 tokens are 90 steps. KLD is the same there, within 1 %, with a `step` of 0.005 and of 0.01. With
24 steps 0.012 was better than 0.005, with 6 0.02 than 0.005 and 0.05, with 4 on another model 0.05 than 0.005 and 0.1.
"""
FEW_TOKENS = 8192
"""Fewer tokens say less of what other text needs, so steps shrink with the root of their share of this. Without it four
sequences of 128 tokens raised the KLD of mq4 on other text by 1.1 per cent, with it by 0.6.
"""
FLOOR = 0.1
"""A norm or scale moves by shares of itself, and at least by such shares of this part of its vector's mean."""


@dataclass(frozen=True)
class TuneSettings:
    """How a layer is trained; all of it decides the bytes.

    Steps are relative: one step of Adam moves a level or a norm by at most about `step` of its size, and a weight of
    attention by `matrix_step` of its matrix's RMS, times the layer's relative RMS error before. Each bit of gate and up
    above two halves them. Fewer than FEW_STEPS are larger, by the root of that ratio, and steps on fewer tokens than
    FEW_TOKENS smaller, likewise. They fall to zero along a cosine. `batch` counts tokens, in whole sequences; `held`
    is the share of the sequences that are held out.
    """

    epochs: int = EPOCHS
    step: float = 6e-3
    matrix_step: float = 3e-3
    batch: int = 4096
    held: float = 0.06
    seed: int = 5

    def record(self) -> dict[str, Any]:
        """What a file says of it."""
        return asdict(self)


PLAIN = TuneSettings()
"""The settings where nobody asks for others."""


@dataclass(frozen=True)
class LayerTuning:
    """What came of one layer.

    `payloads` u8 [bytes] by name are those that changed, of the size that they had. `before` and `after` are squared
    errors on held-out tokens (see OUTLIER), as shares of the energy that the source's layer adds there; None where
    nothing was trained, and then `note` says why. `leaving` f32 [sequences, length, hidden] is the file's own stream
    behind the layer as it is stored from now on.
    """

    layer: int
    payloads: Mapping[str, U8]
    before: float | None
    after: float | None
    note: str | None
    leaving: F32

    @property
    def kept(self) -> bool:
        """Whether the trained form is the one to store."""
        return bool(self.payloads)

    def record(self) -> dict[str, Any]:
        """What a file says of it."""
        losses = {"before": _short(self.before), "after": _short(self.after), "kept": self.kept}
        return {**losses, **({"note": self.note} if self.note else {})}


def _short(loss: float | None) -> float | None:
    return None if loss is None or not np.isfinite(loss) else float(f"{loss:.6g}")


@dataclass(frozen=True)
class LayerTask:
    """A layer of a file, and what it is trained on.

    `stored` names every tensor of the layer, its AWQ scale too if it has one. `source` gives f32 weights of attention's
    matrices, from which these are trained before they are rounded; one that it does not name stays as it is.
    `entering` f32 [sequences, length, hidden] is the file's own stream before the layer, and `target` the source's
    stream behind it; both may lie in mapped files. An error e there costs |V e|², where `costs` V f32 [hidden, hidden]
    is known; else every direction counts alike.
    """

    config: ModelConfig
    layer: int
    stored: Mapping[str, StoredTensor]
    source: Mapping[str, F32]
    entering: F32
    target: F32
    costs: F32 | None = None


def tune_layer(
    task: LayerTask,
    settings: TuneSettings = PLAIN,
    devices: Sequence[torch.device] = (CPU,),
    leaving: F32 | None = None,
) -> LayerTuning:
    """Train one layer of a file against the source's.

    All is done on the first of the devices but experts, which are spread over them. `leaving`, of the shape of the
    streams, takes the file's stream behind the layer; without it an array is made.

    The bytes are the same whenever the same is done with the same torch on the same kind of device, on any number of
    devices; on a CPU, with the same number of threads. Raises WeightError where a trained matrix cannot be stored.
    """
    with deterministic():
        training = _Training.of(task, settings, devices[0])
        student = Student.read(task.config, task.layer, task.stored, devices)
        held, trained = training.divided()
        payloads: dict[str, U8] = {}
        before = after = note = None
        energy = training.energy(held) if len(held) else 0.0
        if not len(held):
            note = f"layer {task.layer} was not tuned: {len(task.entering)} sequences leave none to judge by"
        elif not 0 < energy < math.inf:
            note = f"layer {task.layer} was not tuned: what the source's layer adds is nothing, or no numbers"
        else:
            missed = training.missed(student, held)
            cap = OUTLIER * float(missed.median())
            before = float(missed.clamp_max(cap).mean()) / energy
            candidate = training.train(student, trained, before, energy)
            if candidate is None:
                note = f"layer {task.layer} was not tuned: training led to values that are no numbers"
            else:
                tuned = student.reread(candidate)
                after = float(training.missed(tuned, held).clamp_max(cap).mean()) / energy
                if after < before:
                    student, payloads = tuned, training.payloads(candidate)
        out = training.run(student, np.empty_like(task.entering) if leaving is None else leaving)
    return LayerTuning(task.layer, payloads, before, after, note, out)


def run_layer(
    task: LayerTask, settings: TuneSettings = PLAIN, devices: Sequence[torch.device] = (CPU,)
) -> F32:
    """The file's own stream f32 [sequences, length, hidden] behind a layer as it is stored; the bits of `leaving`."""
    with deterministic():
        student = Student.read(task.config, task.layer, task.stored, devices)
        return _Training.of(task, settings, devices[0]).run(student, np.empty_like(task.entering))


@dataclass
class _Part:
    """One tensor that is trained: base + unit · moved, where `moved` begins at zero."""

    base: Tensor
    unit: Tensor
    step: float
    moved: Tensor

    @classmethod
    def of(cls, base: Tensor, unit: Tensor, step: float) -> _Part:
        return cls(base, unit, step, torch.zeros_like(base).requires_grad_())

    @property
    def value(self) -> Tensor:
        return self.base + self.unit * self.moved


@dataclass(frozen=True)
class _Training:
    """One layer's training."""

    task: LayerTask
    settings: TuneSettings
    device: torch.device
    entering: Stream
    target: Stream
    costs: Tensor | None

    @classmethod
    def of(cls, task: LayerTask, settings: TuneSettings, device: torch.device) -> _Training:
        costs = None if task.costs is None else torch.tensor(task.costs, device=device)
        entering, target = (Stream.on(device, stream) for stream in (task.entering, task.target))
        return cls(task, settings, device, entering, target, costs)

    def cost(self, errors: Tensor) -> Tensor:
        """What errors [..., hidden] behind the layer cost, in their dtype: their square where nothing else is known."""
        return (errors if self.costs is None else errors @ self.costs.to(errors.dtype).T).square().sum(-1)

    def payloads(self, candidate: Mapping[str, StoredTensor]) -> dict[str, U8]:
        """The payloads that are not those that the layer has."""

        def changed(name: str) -> bool:
            return not np.array_equal(candidate[name].payload, self.task.stored[name].payload)

        with ThreadPoolExecutor(cores()) as pool:
            moved = zip(candidate, pool.map(changed, candidate), strict=True)
            return {name: candidate[name].payload for name, differs in moved if differs}

    def divided(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sequences that are held out, in order, and those that are trained on; none where there is but one."""
        count = len(self.task.entering)
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed)).numpy()
        held = 0 if count < 2 else min(max(1, round(self.settings.held * count)), count - 1)
        return np.sort(drawn[:held]), np.sort(drawn[held:])

    def _batches(self, chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        size = max(1, self.settings.batch // self.task.entering.shape[1])
        for first in range(0, len(chosen), size):
            yield chosen[first : first + size]

    def energy(self, chosen: NDArray[np.int64]) -> float:
        """The cost, in f64, of what the source's layer adds to a token of these sequences, in the mean."""
        total = 0.0
        for some in self._batches(chosen):
            added = self.target.of(some) - self.entering.of(some)
            total += float(self.cost(added.double()).sum())
        return total / (len(chosen) * int(self.task.entering.shape[1]))

    @torch.no_grad()
    def missed(self, student: Student, chosen: NDArray[np.int64]) -> Tensor:
        """The cost of the error of the layer's output at each token of these sequences, f64 [tokens]."""
        return torch.cat(
            [
                self.cost((student.forward(self.entering.of(some)) - self.target.of(some)).double()).flatten()
                for some in self._batches(chosen)
            ]
        )

    @torch.no_grad()
    def run(self, student: Student, leaving: F32) -> F32:
        """The stream behind the layer, written into `leaving`."""
        for some in self._batches(np.arange(len(self.task.entering))):
            fetch(student.forward(self.entering.of(some)), leaving[some[0] : some[-1] + 1])
        return leaving

    def train(
        self, student: Student, chosen: NDArray[np.int64], before: float, energy: float
    ) -> dict[str, StoredTensor] | None:
        """The tensors that training on these sequences changes, as they would be stored; None where it diverges.

        `before` is the error now, as a share of `energy`.
        """
        steps = self.settings.epochs * sum(1 for _ in self._batches(chosen))
        size = min(1.0, math.sqrt(before)) * math.sqrt(max(1.0, FEW_STEPS / max(1, steps)))
        size *= 2.0 ** (2 - min(m.format.bits for m in student.experts.values()))
        size *= math.sqrt(min(1.0, len(chosen) * self.task.entering.shape[1] / FEW_TOKENS))
        dense, heads = self._parts(student, size)
        parts = [*dense.values(), *heads.values()]
        groups = [{"params": [part.moved], "lr": part.step} for part in parts]
        adam = torch.optim.Adam(groups, betas=BETAS, fused=self.device.type == "cuda")
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
        order = torch.Generator().manual_seed(self.settings.seed)
        epochs = (
            chosen[torch.randperm(len(chosen), generator=order).numpy()] for _ in range(self.settings.epochs)
        )
        with coarse_products(self.device):
            for some in (batch for shuffled in epochs for batch in self._batches(shuffled)):
                moved = student.changed(*({k: p.value for k, p in of.items()} for of in (dense, heads)))
                out = moved.forward(self.entering.of(some), step_dtype(self.device))
                missed = self.cost(out - self.target.of(some))
                adam.zero_grad()
                (missed.mean() / energy).backward()  # type: ignore[no-untyped-call]
                if not adam.state:
                    _set_divisors(adam)
                adam.step()
                cosine.step()
        with torch.no_grad(), ThreadPoolExecutor(cores()) as pool:
            if not all(part.moved.isfinite().all() for part in parts):
                return None
            values = {name: fetched(part.value) for name, part in dense.items()}
            trained = {p: fetched(part.value) for p, part in heads.items()}
            experts = [(p, e) for p, heads_of in trained.items() for e in range(len(heads_of))]
            return {
                **dict(zip(values, pool.map(self._dense, values, values.values()), strict=True)),
                **dict(pool.map(lambda place: self._expert(place[0], place[1], trained[place[0]]), experts)),
            }

    def _parts(self, student: Student, size: float) -> tuple[dict[str, _Part], dict[str, _Part]]:
        """What is trained, with steps times `size`: dense tensors by name and heads by projection."""
        task, step, matrix_step = self.task, size * self.settings.step, size * self.settings.matrix_step
        dense: dict[str, _Part] = {}
        for spec in layer_inventory(task.config, task.layer):
            fmt = task.stored[spec.name].format
            if spec.role == "norm" and isinstance(fmt, FloatFormat):
                dense[spec.name] = _vector(student.tensor(spec.name), step)
            elif spec.role == "attn" and isinstance(fmt, Q8Format) and spec.name in task.source:
                base = torch.tensor(task.source[spec.name], device=self.device)
                dense[spec.name] = _Part.of(base, base.square().mean().sqrt(), matrix_step)
        scale = awq_scale_name(task.layer)
        if scale in task.stored:
            dense[scale] = _vector(student.tensor(scale), step)
        heads = {p: _Part.of(m.heads, _head_units(m), step) for p, m in student.experts.items()}
        return dense, heads

    def _dense(self, name: str, values: F32) -> StoredTensor:
        """A trained tensor outside the experts as it would be stored."""
        before = self.task.stored[name]
        if isinstance(before.format, FloatFormat):
            values = within_scales(values) if name == awq_scale_name(self.task.layer) else within_f16(values)
        return StoredTensor(
            before.format, before.shape, encode_tensor(name, values, before.format, "hessian")
        )

    def _expert(self, projection: str, expert: int, trained: F32) -> tuple[str, StoredTensor]:
        """One expert's matrix with its trained heads, as it would be stored; `trained` are those of all experts."""
        name = expert_name(self.task.layer, expert, projection)
        before = self.task.stored[name]
        assert isinstance(before.format, LloydFormat | AffineFormat)
        payload = with_heads(before.format, before.payload, trained[expert])
        return name, StoredTensor(before.format, before.shape, payload)


def _set_divisors(adam: torch.optim.Adam) -> None:
    """Let each tensor's divisor be at least the RMS of the gradients that it has now."""
    for group in adam.param_groups:
        (moved,) = group["params"]
        group["eps"] = max(EPSILON, float(moved.grad.square().mean().sqrt()))


def _vector(base: Tensor, step: float) -> _Part:
    size = base.abs()
    return _Part.of(base, torch.maximum(size, FLOOR * size.mean()), step)


def _head_units(matrices: Matrices) -> Tensor:
    """What a step of 1 moves: levels and a grid's zero by the RMS of the levels, a grid's scale by itself."""
    heads = matrices.heads
    if not matrices.even:
        return heads.square().mean(-1, keepdim=True).sqrt()
    scale = heads[..., :1].abs()
    spread = ((matrices.format.levels**2 - 1) / 12) ** 0.5
    return torch.cat([scale, spread * scale], -1)
