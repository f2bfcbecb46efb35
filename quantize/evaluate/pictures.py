"""The pictures of an evaluation, each as PNG and SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...formats.own_file import disk_errors
from ...verify import pictures
from ...verify.pictures import Measured
from ..write.atomic import write_atomic
from .result import EvaluatedFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BY_SIZE, BY_TOKENS, BY_LAYER = "kld-by-size", "kld-by-tokens", "error-by-layer"
_PLAIN = re.compile(r"[^\w.-]+")


def pictures_of(files: Sequence[EvaluatedFile]) -> dict[str, Figure]:
    """The pictures that there are figures for, by the names of their files: KLD against size, against calibration
    tokens where files differ in them, and the error behind each layer of every file.
    """
    labels = _labels(files)
    known = [f for f in files if math.isfinite(f.divergence.kld_mean)]
    points = [
        Measured(labels[f.name], f.bytes, f.divergence.kld_mean, f.divergence.kld_error, f.calibration_tokens)
        for f in known
    ]
    out: dict[str, Figure] = {}
    if points:
        out[BY_SIZE] = pictures.kld_by_size(points)
    if len({p.tokens for p in points} - {None}) > 1:
        out[BY_TOKENS] = pictures.kld_by_tokens(points)
    for f in files:
        if f.layers:
            out[f"{BY_LAYER}-{_PLAIN.sub('-', f.name)}"] = pictures.error_by_layer(f.layers)
    return out


def write_pictures(folder: Path, figures: Mapping[str, Figure]) -> tuple[str, ...]:
    """Write each picture as NAME.png and NAME.svg, in place of older ones; returns the names of the files."""
    names = []
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            write_atomic(folder / f"{name}.png", [memoryview(pictures.png(figure))])
            write_atomic(folder / f"{name}.svg", [memoryview(pictures.svg(figure).encode())])
            names += [f"{name}.png", f"{name}.svg"]
    return tuple(names)


def _labels(files: Sequence[EvaluatedFile]) -> dict[str, str]:
    """What each file is called in a picture: its tier where that tells the files apart, else its name."""
    tiers = [f.tier for f in files]
    if None not in tiers and len(set(tiers)) == len(tiers):
        return {f.name: f.tier or f.name for f in files}
    return {f.name: f.name for f in files}
