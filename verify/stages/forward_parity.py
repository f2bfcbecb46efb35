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
from numpy.typing import NDArray

from ...formats.errors import CheckError
from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.strictjson import finite
from ...formats.watch import UNWATCHED, Watch, watched
from ...kernels.runtime.host import Backend
from ..bars import Bars
from ..evaluate.dense import of_source
from ..evaluate.head import Head, judge
from ..hidden import HiddenWriter
from ..model.kernel_forward import KernelModel
from ..model.layer_model import KernelLayers, TorchModel
from ..model.metrics import DivergenceSummary, LayerFigures, layer_figures, standard_error
from ..model.reference import Weights
from .stage import StageResult

FIRM = 1024
"""Positions from which on a mean KL divergence is firm enough to be compared with others."""


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
        flat = finite(asdict(self))
        return {**flat, **{k: v for k, v in flat.pop("divergence").items() if k != "positions"}}


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
    kernels = KernelModel(file, cfg, backend, tokens.shape[1])
    reference, test = TorchModel(source, cfg), KernelLayers(kernels)
    theirs, ours = reference.embed(tokens), test.embed(tokens)
    layers, shape = list[LayerFigures](), (cfg.num_hidden_layers, tokens.size, cfg.hidden_size)
    with HiddenWriter(dump, *shape) if dump else nullcontext() as writer:
        for layer in watched(range(cfg.num_hidden_layers), watch, "forward", "layers"):
            a, b = reference.layer(layer, theirs), test.layer(layer, ours)
            theirs, ours = a.stream, b.stream
            layers.append(layer_figures(layer, theirs, ours, a.ids, b.ids))
            if math.isnan(layers[-1].cosine_mean):
                raise CheckError(f"layer {layer}: the hidden state is not a number", file=file.path)
            if writer:
                writer.add(ours.numpy().reshape(tokens.size, -1))
    comparison = of_source(Head(reference, theirs), tokens, cfg.vocab_size, models=1)
    (found,) = judge(comparison, [Head(test, ours)], watch)
    summary = found.summary()
    if not math.isfinite(summary.kld_mean):
        raise CheckError("logits: the KL divergence is not a number", file=file.path)
    figures = ForwardFigures(
        positions=tokens.size,
        backend=backend.name,
        device=backend.device,
        layers=tuple(layers),
        divergence=summary,
        kld=tuple(round(float(v), 9) for v in found.kld),
        weight_bytes_read=kernels.traffic.read,
        weight_bytes_peak=kernels.traffic.peak,
        seconds=round(time.monotonic() - began, 3),
    )
    problems = [*_layer_problems(layers, bars), *_summary_problems(summary, bars)]
    notes = _few(found.kld)
    return StageResult("forward", tokens.size, "positions", tuple(problems), notes, figures)


def _few(kld: NDArray[np.float64]) -> tuple[str, ...]:
    """A warning where few positions were judged, with the standard error of their mean."""
    if len(kld) >= FIRM:
        return ()
    error = "" if len(kld) < 2 else f", which is known to about ± {standard_error(kld):.2g}"
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
