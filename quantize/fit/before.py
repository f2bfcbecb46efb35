"""What is settled before a measurement begins: its tokens and what it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...formats.checkpoint.source import Source
from ...formats.errors import TokenError
from ...texts import CALIBRATION_SHA256
from ..calibrate.tokens import EVALUATION, TokenRequest, Tokens, load_tokens, read_tokens
from ..pipeline.statistics import ImatrixFile, MomentFolder, OnTheFly, Statistics, effort_of
from ..spec.calibration_sizes import inline_sizes, measuring_sizes, moment_bytes, sensitivity_sizes
from ..spec.efforts import measuring_hours
from .measurement import EXPERT_NAMES
from .pieces import Choice

HELD_OUT = 4096
"""Tokens on which predictions are compared where nothing else is asked, if that is at most a quarter of all."""
MIXED = (("MQ2-Lloyd", "MQ3-Lloyd"), ("MQ2-Lloyd", "MQ4"), ("MQ3-Lloyd", "MQ4"))
WHOLES = (*(Choice(name, name) for name in EXPERT_NAMES), *(Choice(*pair) for pair in MIXED))
"""The formats of whole models that are measured beside the pieces: each alone, and as the tiers mix them."""


@dataclass(frozen=True)
class Texts:
    """Token ids i32 [sequences, length]: those that importances are gathered from, and others, on which predictions are
    compared. `text` is the SHA-256 of the text that comes with mq-quant where the first are of that.
    """

    calibrating: Tokens
    judging: Tokens
    text: str | None


def measuring_statistics(
    effort: Literal["imatrix", "calibrated"],
    imatrix: Path | None = None,
    calibration: Path | None = None,
    device: str = "cpu",
) -> Statistics | None:
    """What pieces are rounded under: a calibration folder, or what the effort asks for, on a device of torch's."""
    if calibration is not None:
        return MomentFolder(calibration, imatrix)
    if effort == "calibrated":
        return OnTheFly(device=device, imatrix=imatrix)
    return ImatrixFile(imatrix) if imatrix else None


def texts_of(
    source: Source,
    request: TokenRequest | Tokens,
    judging: Path | Tokens | None,
    held_out: int | None,
    calibrates: bool,
) -> Texts:
    """The tokens of a request, and `held_out` sequences to compare predictions on; TokenError where there are too few.

    The latter are those of `judging`, or of the evaluation text that comes with mq-quant where the request is of its
    calibration text; spread evenly over either. Else they are the last ones of the request, and nothing is calibrated
    on them. Without `held_out` it is HELD_OUT tokens, or of the request at most a quarter.
    """
    bundled = isinstance(request, TokenRequest) and request.bundled

    def calibrating() -> Tokens:
        return load_tokens(source, request) if isinstance(request, TokenRequest) else request

    if judging is not None:
        given = read_tokens(judging, source.config) if isinstance(judging, Path) else judging
        judged = _spread(given, held_out, judging if isinstance(judging, Path) else "judge_tokens")
    elif isinstance(request, TokenRequest) and request.bundled:
        judged = _spread(load_tokens(source, TokenRequest(length=request.length), EVALUATION), held_out)
    else:
        return _last_aside(calibrating(), held_out, calibrates)
    tokens = calibrating() if calibrates else judged[:0]
    return Texts(tokens, judged, CALIBRATION_SHA256 if bundled else None)


def _spread(tokens: Tokens, wanted: int | None, file: Path | str = EVALUATION.name) -> Tokens:
    """So many of the sequences, at even distances."""
    count = wanted or min(len(tokens), max(1, HELD_OUT // tokens.shape[1]))
    if count > len(tokens):
        raise TokenError(
            f"has {len(tokens)} sequences to compare predictions on, fewer than the {count} asked for",
            file=file,
            hint="ask for less with --held-out",
        )
    chosen: Tokens = tokens[np.arange(count) * len(tokens) // count]
    return chosen


def _last_aside(tokens: Tokens, wanted: int | None, calibrates: bool) -> Texts:
    """The last sequences set aside; where nothing calibrates, those before them are left out."""
    most = max(1, len(tokens) // 4) if calibrates else len(tokens)
    aside = wanted or min(most, max(1, HELD_OUT // tokens.shape[1]))
    left = len(tokens) - aside
    if left < int(calibrates):
        raise TokenError(
            f"{len(tokens)} sequences are too few: predictions are compared on {aside}, on which nothing may be "
            "calibrated",
            hint="give more tokens, or ask for less with --held-out",
        )
    return Texts(tokens[:left], tokens[left:], None)


@dataclass(frozen=True)
class MeasureCost:
    """What a measurement takes: memory at its peak, disk beside its output, and about how many hours."""

    tokens: int
    judged_tokens: int
    memory_bytes: int
    disk_bytes: int
    hours: float

    def as_json(self) -> dict[str, Any]:
        """What `measure --dry-run --json` prints."""
        return asdict(self)


def cost_of(
    source: Source, texts: Texts, statistics: Statistics | None, jobs: int, device: str = "cpu"
) -> MeasureCost:
    """What a measurement takes on so many threads, or on one GPU; the disk that shards take is not counted."""
    config, judged = source.config, int(texts.judging.size)
    tokens = int(texts.calibrating.size) if isinstance(statistics, OnTheFly) else 0
    sizes = measuring_sizes(config, judged, len(EXPERT_NAMES), len(WHOLES), jobs)
    effort = effort_of(statistics) or "imatrix"
    memory, disk = sizes.memory_bytes, sizes.disk_bytes
    if effort != "imatrix":
        memory += moment_bytes(config, jobs)
    sensitive = isinstance(statistics, OnTheFly) and statistics.sensitive(source)
    if tokens:
        gathering = inline_sizes(config, tokens, memory)
        memory, disk = gathering.memory_bytes, disk + gathering.disk_bytes
    if sensitive:
        before, meanwhile, stays = sensitivity_sizes(config, tokens)
        memory, disk = max(memory, before), max(meanwhile, disk + stays)
    spent = measuring_hours(config, effort, tokens, judged, len(EXPERT_NAMES), jobs, device, sensitive)
    return MeasureCost(tokens, judged, memory, disk, round(spent, 4))
