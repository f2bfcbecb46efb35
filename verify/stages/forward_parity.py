"""Stage 3: the file run through the kernels against its own decoded weights in torch, teacher-forced.

Both hold the same numbers, so what differs is the arithmetic: rotations, scales, formats, attention and routing as the
engine does them. Both passes go through the layers side by side, so that one layer of each is in memory.
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
from ..evaluate.dense import of_source
from ..evaluate.head import Head, judge
from ..hidden import HiddenWriter
from ..model.hfq_weights import DecodedFile
from ..model.kernel_forward import KernelModel
from ..model.layer_model import KernelLayers, TorchModel
from ..model.metrics import DivergenceSummary, LayerFigures, layer_figures
from .stage import StageResult

POSITIONS = 64
"""Positions that are run, unless their hidden states are asked for: the CPU's kernels are slow."""
COSINE, KLD = 0.999, 0.005
"""The smallest mean cosine of a layer and the largest mean KLD (nats) between two ways of computing the same. Measured:
0.99999 and 5e-5; where two experts are as good as equal, one position may take the other."""


@dataclass(frozen=True)
class ForwardFigures:
    """The kernels' forward pass against torch's.

    `weight_bytes_read` is what the kernels read of the weights, `weight_bytes_peak` the most that they held at a time.
    """

    positions: int
    backend: str
    device: str
    layers: tuple[LayerFigures, ...]
    divergence: DivergenceSummary
    weight_bytes_read: int
    weight_bytes_peak: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The divergence's figures stand beside the others; a perplexity that is not known is None."""
        flat = finite(asdict(self))
        return {**flat, **{k: v for k, v in flat.pop("divergence").items() if k != "positions"}}


def check_forward(
    file: HfqFile,
    cfg: ModelConfig,
    backend: Backend,
    tokens: NDArray[np.integer],
    dump: Path | None = None,
    watch: Watch = UNWATCHED,
) -> StageResult:
    """Run token ids [n_seq, len] both ways; `dump` writes the kernels' hidden states (HFHS).

    Raises CheckError for ids outside the vocabulary, for sequences of no tokens, and where a result is not a number.
    """
    check_tokens(tokens, cfg)
    began = time.monotonic()
    kernels = KernelModel(file, cfg, backend, tokens.shape[1])
    reference, test = TorchModel(DecodedFile(file), cfg), KernelLayers(kernels)
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
    figures = ForwardFigures(
        positions=tokens.size,
        backend=backend.name,
        device=backend.device,
        layers=tuple(layers),
        divergence=summary,
        weight_bytes_read=kernels.traffic.read,
        weight_bytes_peak=kernels.traffic.peak,
        seconds=round(time.monotonic() - began, 3),
    )
    return StageResult("forward", tokens.size, "positions", tuple(_problems(layers, summary)), (), figures)


def _problems(layers: list[LayerFigures], summary: DivergenceSummary) -> list[str]:
    problems = [
        f"layer {row.layer}: the kernels' hidden state has a mean cosine of {row.cosine_mean:.6f} with that of the "
        f"same weights in torch, under {COSINE}"
        for row in layers
        if not row.cosine_mean >= COSINE
    ]
    if not summary.kld_mean <= KLD:  # a NaN does not hold either
        problems.append(
            f"logits: the kernels' mean KL divergence from the same weights in torch is {summary.kld_mean:.6f}, "
            f"over {KLD}"
        )
    return problems


def check_tokens(tokens: NDArray[np.integer], cfg: ModelConfig) -> None:
    """CheckError unless token ids [n_seq, len] can be run."""
    if tokens.ndim != 2 or tokens.size == 0:
        raise CheckError("there are no tokens to run", hint="give --tokens, --prompt or --token-file")
    if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
        raise CheckError(
            f"token ids reach from {tokens.min()} to {tokens.max()}, the vocabulary has {cfg.vocab_size}"
        )
