"""Stage 4: the file run through the kernels against the reference forward on the source, teacher-forced.

Both passes go through the layers side by side, so that one layer of each is in memory: cosine of the residual stream
and routing agreement per layer, then KL divergence of the next-token distributions.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.errors import CheckError
from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.watch import UNWATCHED, Watch, watched
from ...kernels.runtime.host import Backend
from ..bars import Bars
from ..hidden import HiddenWriter
from ..model.kernel_forward import KernelModel
from ..model.metrics import Divergence, DivergenceSummary, cosine
from ..model.reference import Observer, Routing, Weights, embed, layer_forward, logits
from .stage import StageResult

FIRM = 1024
"""Positions from which on a mean KL divergence is firm enough to be compared with others."""


@dataclass(frozen=True)
class LayerFigures:
    """One layer: cosine of the residual stream over positions, and the share of routed experts that both chose."""

    layer: int
    cosine_mean: float
    cosine_min: float
    routing: float


@dataclass(frozen=True)
class ForwardFigures:
    """The forward pass of the file against the source's: each layer, all positions together, and each position's KLD.

    `weight_bytes_read` is what the kernels read of the weights, `weight_bytes_peak` the most that they held at a time.
    """

    positions: int
    backend: str
    device: str
    layers: tuple[LayerFigures, ...]
    divergence: DivergenceSummary
    kld: tuple[float, ...]
    weight_bytes_read: int
    weight_bytes_peak: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The divergence's figures stand beside the others; a perplexity that is not known is None."""
        flat = asdict(self)
        divergence = {k: _finite(v) for k, v in flat.pop("divergence").items() if k != "positions"}
        return {**flat, **divergence}


class _Choices(Observer):
    """Keeps the experts that the reference routes to in the current layer, i64 [n, k]."""

    ids: Tensor

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        self.ids = routing.ids


def check_forward(
    file: HfqFile,
    source: Weights,
    cfg: ModelConfig,
    backend: Backend,
    tokens: NDArray[np.integer],
    bars: Bars,
    dump: Path | None = None,
    watch: Watch = UNWATCHED,
) -> StageResult:
    """Run token ids [n_seq, len] through both models; `dump` writes the kernels' hidden states (HFHS).

    Raises CheckError for ids outside the vocabulary, for sequences of no tokens, and where a result is not a number.
    """
    check_tokens(tokens, cfg)
    began = time.monotonic()
    model = KernelModel(file, cfg, backend, tokens.shape[1])
    states = [model.embed(sequence) for sequence in tokens]
    at = [model.positions(0, tokens.shape[1])] * len(tokens)
    hidden, choices, layers = embed(source, tokens), _Choices(), list[LayerFigures]()
    shape = cfg.num_hidden_layers, tokens.size, cfg.hidden_size
    with HiddenWriter(dump, *shape) if dump else nullcontext() as writer:
        for layer in watched(range(cfg.num_hidden_layers), watch, "forward", "layers"):
            hidden = layer_forward(source, cfg, layer, hidden, choices)
            ids = model.layer(layer, states, at, [model.cache() for _ in tokens])
            got = np.stack([backend.download(h) for h in states])
            layers.append(_figures(layer, hidden, torch.from_numpy(got), choices.ids, ids))
            if math.isnan(layers[-1].cosine_mean):
                raise CheckError(f"layer {layer}: the hidden state is not a number", file=file.path)
            if writer:
                writer.add(got.reshape(tokens.size, -1))
    found = Divergence()
    for reference, test, sequence in zip(
        logits(source, cfg, hidden), model.logits(states), tokens, strict=True
    ):
        found.add(reference, torch.from_numpy(test), sequence)
    summary = found.summary()
    if not math.isfinite(summary.kld_mean):
        raise CheckError("logits: the KL divergence is not a number", file=file.path)
    figures = ForwardFigures(
        positions=tokens.size,
        backend=backend.name,
        device=backend.device,
        layers=tuple(layers),
        divergence=summary,
        kld=tuple(round(float(v), 9) for v in found.values()),
        weight_bytes_read=model.traffic.read,
        weight_bytes_peak=model.traffic.peak,
        seconds=round(time.monotonic() - began, 3),
    )
    problems = [*_layer_problems(layers, bars), *_summary_problems(summary, bars)]
    notes = _few(found.values())
    return StageResult("forward", tokens.size, "positions", tuple(problems), notes, figures)


def _few(kld: NDArray[np.float64]) -> tuple[str, ...]:
    """A warning where few positions were judged, with the standard error of their mean."""
    if len(kld) >= FIRM:
        return ()
    error = "" if len(kld) < 2 else f", which is known to about ± {kld.std(ddof=1) / math.sqrt(len(kld)):.2g}"
    return (
        f"judged by {len(kld)} positions only, too few for a firm mean KLD{error}; more --tokens make it firmer",
    )


def check_tokens(tokens: NDArray[np.integer], cfg: ModelConfig) -> None:
    """CheckError unless token ids [n_seq, len] can be run."""
    if tokens.ndim != 2 or tokens.size == 0:
        raise CheckError("there are no tokens to run", hint="give --tokens, --prompt or --token-file")
    if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
        raise CheckError(
            f"token ids reach from {tokens.min()} to {tokens.max()}, the vocabulary has {cfg.vocab_size}"
        )


def _figures(layer: int, reference: Tensor, test: Tensor, theirs: Tensor, ours: NDArray[Any]) -> LayerFigures:
    cosines = cosine(reference, test)
    same = (theirs.numpy()[:, :, None] == ours[:, None, :]).any(-1)
    return LayerFigures(layer, float(cosines.mean()), float(cosines.min()), float(same.mean()))


def _layer_problems(layers: list[LayerFigures], bars: Bars) -> list[str]:
    problems = []
    for name in ("cosine_mean", "cosine_min", "routing"):
        bar = getattr(bars, name)
        for row in layers:
            value = getattr(row, name)
            if bar is not None and not value >= bar:  # a NaN does not hold either
                problems.append(f"layer {row.layer}: {name} is {value:.6f}, under {bar}")
    problems += [
        f"layer {row.layer}: the hidden state is not a number"
        for row in layers
        if math.isnan(row.cosine_mean)
    ]
    return problems


def _summary_problems(summary: DivergenceSummary, bars: Bars) -> list[str]:
    problems = []
    if bars.kld_mean is not None and not summary.kld_mean <= bars.kld_mean:
        problems.append(f"logits: the mean KL divergence is {summary.kld_mean:.6f}, over {bars.kld_mean}")
    if bars.top1 is not None and not summary.top1 >= bars.top1:
        problems.append(f"logits: top-1 agreement is {summary.top1:.4f}, under {bars.top1}")
    return problems


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
