"""What is settled before a measurement begins: its tokens, what it takes, and outputs that cannot be written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...formats.checkpoint.source import Source
from ...formats.errors import OutputError, TokenError
from ...formats.own_file import disk_errors, free_bytes
from ...texts import CALIBRATION_SHA256
from ..calibrate.tokens import TokenRequest, Tokens, load_tokens
from ..pipeline.statistics import OnTheFly, Statistics, effort_of
from ..spec.calibration_sizes import USUAL_TOKENS, inline_sizes, measuring_sizes
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
    compared. `text` is the SHA-256 of the text that comes with mq-quant where they are of that.
    """

    calibrating: Tokens
    judging: Tokens
    text: str | None


def texts_of(source: Source, request: TokenRequest, held_out: int | None, calibrates: bool) -> Texts:
    """The tokens of a request, its last `held_out` sequences set aside; TokenError where nothing is left of either.

    Without `held_out` it is HELD_OUT tokens, or a quarter where there are few. Of the text that comes with mq-quant
    they are taken besides those that a build calibrates on. Where nothing calibrates, the rest is left out.
    """
    length = min(request.length, source.config.max_position_embeddings) if request.bundled else request.length
    aside = held_out or max(1, HELD_OUT // length)
    if request.bundled:
        used = (request.sequences or USUAL_TOKENS // length) if calibrates else 0
        request = TokenRequest(sequences=used + aside, length=length)
    tokens = load_tokens(source, request)
    if held_out is None:
        aside = min(
            max(1, HELD_OUT // tokens.shape[1]), max(1, len(tokens) // 4) if calibrates else len(tokens)
        )
    left = len(tokens) - aside
    if left < int(calibrates):
        raise TokenError(
            f"{len(tokens)} sequences are too few: predictions are compared on {aside}, on which nothing may be "
            "calibrated",
            hint="give more tokens, or ask for less with --held-out",
        )
    text = CALIBRATION_SHA256 if request.bundled else None
    return Texts(tokens[:left], tokens[left:], text)


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
    memory, disk = sizes.memory_bytes, sizes.disk_bytes
    if tokens:
        gathering = inline_sizes(config, tokens, memory)
        memory, disk = gathering.memory_bytes, disk + gathering.disk_bytes
    effort = effort_of(statistics) or "imatrix"
    spent = measuring_hours(config, effort, tokens, judged, len(EXPERT_NAMES), jobs, device)
    return MeasureCost(tokens, judged, memory, disk, round(spent, 2))


def check_output(path: Path, force: bool, needed: int) -> None:
    """OutputError where the output exists, has no folder, or the work does not fit on its disk. Touches nothing."""
    if not path.parent.is_dir():
        raise OutputError("its folder does not exist", file=path, hint=f"mkdir -p {path.parent}")
    if path.exists() and not (force and path.is_file()):
        raise OutputError("exists already", file=path, hint="give --force to replace it, or another name")
    with disk_errors(path):
        free = free_bytes(path.parent)
    if free is not None and free < needed:
        raise OutputError(
            f"the work needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free",
            file=path,
            hint="free some space, give --output on another disk, or ask for less with --held-out",
        )
