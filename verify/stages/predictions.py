"""Stage 5: the file's weights against the source's, teacher-forced: what comes of all errors together.

Both models run in torch, layer by layer, as `evaluate` runs many of them: hidden states and routing after each layer,
then KL divergence of the next-token distributions. The bars of the file's tier are held against it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import CheckError
from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.strictjson import finite
from ...formats.watch import UNWATCHED, Watch
from ..bars import Bars
from ..evaluate.dense import of_source
from ..evaluate.head import Head, judge
from ..model.hfq_weights import DecodedFile, check_shapes
from ..model.layer_model import TorchModel
from ..model.metrics import FEWEST, DivergenceSummary, LayerFigures, layer_figures, standard_error
from ..model.reference import Weights
from .forward_parity import check_tokens
from .stage import StageResult

FIRM = 1024
"""Positions from which on a mean KL divergence is firm enough to be compared with others."""


@dataclass(frozen=True)
class PredictionFigures:
    """The file's model against the source's: each layer, all positions together, and each position's KLD."""

    positions: int
    layers: tuple[LayerFigures, ...]
    divergence: DivergenceSummary
    kld: tuple[float, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The divergence's figures stand beside the others; a perplexity that is not known is None."""
        flat = finite(asdict(self))
        return {**flat, **{k: v for k, v in flat.pop("divergence").items() if k != "positions"}}


class PredictionCheck:
    """Runs both models on token ids [n_seq, len]: `embed`, every `layer` in turn, then `result`.

    Raises CheckError for tokens that cannot be run, and for fewer than `fewest` positions: so few judge nothing.
    """

    def __init__(
        self,
        file: HfqFile,
        source: Weights,
        cfg: ModelConfig,
        tokens: NDArray[np.integer],
        bars: Bars,
        fewest: int = FEWEST,
    ) -> None:
        check_tokens(tokens, cfg)
        if tokens.size < fewest:
            raise CheckError(
                f"there are {tokens.size} positions, too few to judge by: {fewest} are the fewest",
                hint=f"give more tokens, or --tokens {tokens.size} to judge by these",
            )
        check_shapes(file, cfg)
        self._file, self._cfg, self._tokens, self._bars = file, cfg, tokens, bars
        self._theirs, self._ours = TorchModel(source, cfg), TorchModel(DecodedFile(file), cfg)
        self._layers: list[LayerFigures] = []
        self._seconds = 0.0

    def embed(self) -> None:
        """Read the embeddings."""
        with self._timed():
            self._streams = self._theirs.embed(self._tokens), self._ours.embed(self._tokens)

    def layer(self, layer: int) -> None:
        """Run one layer of both; CheckError where a hidden state is not a number."""
        with self._timed():
            a, b = (m.layer(layer, s) for m, s in zip((self._theirs, self._ours), self._streams, strict=True))
            self._streams = a.stream, b.stream
            self._layers.append(layer_figures(layer, a.stream, b.stream, a.ids, b.ids))
        if math.isnan(self._layers[-1].cosine_mean):
            raise CheckError(f"layer {layer}: the hidden state is not a number", file=self._file.path)

    def result(self, watch: Watch = UNWATCHED) -> StageResult:
        """Compare the predictions; CheckError where they are not numbers."""
        with self._timed():
            reference, test = (
                Head(m, s) for m, s in zip((self._theirs, self._ours), self._streams, strict=True)
            )
            comparison = of_source(reference, self._tokens, self._cfg.vocab_size, models=1)
            (found,) = judge(comparison, [test], watch)
            summary = found.summary()
        if not math.isfinite(summary.kld_mean):
            raise CheckError("logits: the KL divergence is not a number", file=self._file.path)
        figures = PredictionFigures(
            positions=self._tokens.size,
            layers=tuple(self._layers),
            divergence=summary,
            kld=tuple(round(float(v), 9) for v in found.kld),
            seconds=round(self._seconds, 3),
        )
        problems = [*_layer_problems(self._layers, self._bars), *_summary_problems(summary, self._bars)]
        return StageResult(
            "predictions", self._tokens.size, "positions", tuple(problems), _few(found.kld), figures
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds += time.monotonic() - began


def check_predictions(
    file: HfqFile,
    source: Weights,
    cfg: ModelConfig,
    tokens: NDArray[np.integer],
    bars: Bars,
    fewest: int = FEWEST,
) -> StageResult:
    """The whole stage, from a source that needs no order."""
    check = PredictionCheck(file, source, cfg, tokens, bars, fewest)
    check.embed()
    for layer in range(cfg.num_hidden_layers):
        check.layer(layer)
    return check.result()


def _few(kld: NDArray[np.float64]) -> tuple[str, ...]:
    """A warning where few positions were judged, with the standard error of their mean."""
    if len(kld) >= FIRM:
        return ()
    error = "" if len(kld) < 2 else f", which is known to about ± {standard_error(kld):.2g}"
    return (
        f"judged by {len(kld)} positions only, too few for a firm mean KLD{error}; more --tokens make it firmer",
    )


def _layer_problems(layers: list[LayerFigures], bars: Bars) -> list[str]:
    problems = []
    for name in ("cosine_mean", "cosine_min", "routing"):
        bar = getattr(bars, name)
        for row in layers:
            value = getattr(row, name)
            if bar is not None and not value >= bar:  # a NaN does not hold either
                problems.append(f"layer {row.layer}: {name} is {value:.6f}, under {bar}")
    return problems


def _summary_problems(summary: DivergenceSummary, bars: Bars) -> list[str]:
    problems = []
    if bars.kld_mean is not None and not summary.kld_mean <= bars.kld_mean:
        problems.append(f"logits: the mean KL divergence is {summary.kld_mean:.6f}, over {bars.kld_mean}")
    if bars.top1 is not None and not summary.top1 >= bars.top1:
        problems.append(f"logits: top-1 agreement is {summary.top1:.4f}, under {bars.top1}")
    return problems
