"""A verification as one self-contained page: what the file says of itself, the stages, their figures, and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import yaml

from ..formats.minimax import PROJECTIONS
from . import pictures
from .bars import Bars
from .facts import FileFacts
from .page import escaped, figure, fold, page, table
from .run import Verification
from .stages.fidelity import FidelityFigures, ProjectionFidelity
from .stages.forward_parity import ForwardFigures
from .stages.generation import Continuation
from .stages.predictions import PredictionFigures
from .stages.stage import LISTED

PROMPT_SHOWN = 400
"""Characters of the prompt, its last ones, that stand above a continuation."""
UNKNOWN = "not said"
_FIGURES = (
    ("kld_mean", "KL divergence, mean (nats)"),
    ("kld_error", "standard error of the mean"),
    ("kld_median", "median"),
    ("kld_p95", "95 %"),
    ("kld_p99", "99 %"),
    ("kld_p999", "99.9 %"),
    ("kld_max", "maximum"),
    ("top1", "same most likely token"),
    ("top8", "same eight most likely tokens"),
    ("ppl_reference", "perplexity of the source"),
    ("ppl_test", "perplexity of the file"),
    ("ppl_test_error", "its standard error"),
    ("positions", "positions"),
)
"""What is shown of the KL divergence's summary; a figure that is not finite is left out."""
_BARS = (
    ("cosine_mean", "mean cosine of every layer", "at least"),
    ("cosine_min", "cosine at any position", "at least"),
    ("routing", "share of equally routed experts", "at least"),
    ("kld_mean", "mean KL divergence", "at most"),
    ("top1", "same most likely token", "at least"),
)


def render(verification: Verification) -> str:
    """The page of a verification; the same for the same one."""
    word, kind = ("passed", "ok") if verification.ok else ("failed", "bad")
    parts = [f"<h1>{escaped(verification.path)}: <span class={kind}>{word}</span></h1>"]
    if verification.facts is not None:
        parts += _facts(verification.facts)
    predictions = verification.figures(PredictionFigures)
    parts += [_overview(verification), _thresholds(verification.bars, predictions)]
    if predictions is not None:
        parts += _predictions(predictions)
    if forward := verification.figures(ForwardFigures):
        parts += _forward(forward)
    if (fidelity := verification.figures(FidelityFigures)) and fidelity.rows:
        parts += _fidelity(fidelity)
    made = verification.figures(Continuation)
    if made and made.text is not None:
        prompt = escaped((made.prompt or "")[-PROMPT_SHOWN:], keep="\n")
        parts.append(f"<h2>Greedy continuation</h2><p class=note>after: {prompt}</p>")
        parts.append(f"<blockquote>{escaped(made.text, keep=chr(10))}</blockquote>")
    return page(f"{verification.path}: {word}", parts)


def _facts(facts: FileFacts) -> list[str]:
    origin = " at ".join(str(value) for value in facts.origin.values()) or UNKNOWN
    calibration = facts.calibration or "none"
    if facts.calibration_tokens is not None:
        calibration += f", on {facts.calibration_tokens:,} tokens"
    rows = [
        ("tier", facts.tier or UNKNOWN),
        ("model", facts.model or UNKNOWN),
        ("size", f"{facts.bytes:,} bytes in {facts.tensors:,} tensors"),
        ("made by", facts.program or UNKNOWN),
        ("source", origin),
        ("imatrix (SHA-256)", facts.imatrix or "none"),
        ("calibration (SHA-256)", calibration),
        ("quantization hash", facts.quantization_hash or UNKNOWN),
        ("checksum of the metadata", facts.metadata_checksum or UNKNOWN),
    ]
    parts = ["<h2>The file</h2>", table(("", ""), rows, "What the file says of itself")]
    if facts.recipe:
        text = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True, width=100)
        parts.append(fold("The recipe", f"<pre>{escaped(text, keep=chr(10))}</pre>"))
    if facts.source_files:
        hashes = table(("file", "SHA-256"), facts.source_files.items(), "Files of the source", sortable=True)
        parts.append(fold("The files of the source", hashes))
    return parts


def _overview(verification: Verification) -> str:
    rows = [
        (s.name, "ok" if s.ok else "failed", f"{s.seen:,} {s.unit}", f"{verification.seconds[s.name]:.1f} s")
        for s in verification.stages
    ]
    rows += [(name, "skipped", why, "") for name, why in verification.skipped.items()]
    out = ["<h2>Stages</h2>", table(("stage", "result", "looked at", "time"), rows, "What was judged")]
    for stage in verification.stages:
        if stage.complaints:
            items = "".join(f"<li>{escaped(problem)}</li>" for problem in stage.complaints[:LISTED])
            more = len(stage.complaints) - LISTED
            items += f"<li>and {more} more</li>" if more > 0 else ""
            out.append(f"<p><b>{escaped(stage.name)}</b></p><ul class=bad>{items}</ul>")
        out += [f"<p class=note>{escaped(stage.name)}: {escaped(note)}</p>" for note in stage.notes]
    return "\n".join(out)


def _thresholds(bars: Bars, predictions: PredictionFigures | None) -> str:
    """What the tier demands, and what was measured of it."""
    found = {} if predictions is None else _reached(predictions)
    rows = [
        (label, f"{word} {bar:g}", f"{found[name]:.6g}" if name in found else "not measured")
        for name, label, word in _BARS
        if (bar := getattr(bars, name)) is not None
    ]
    if bars.coherence:
        rows.append(("a continuation in words", "demanded", "see the stage generation"))
    if not rows:
        return "<h2>Thresholds</h2><p class=note>No threshold is known for this file's tier.</p>"
    return "<h2>Thresholds</h2>" + table(("what", "demanded", "measured"), rows, "What the tier demands")


def _reached(predictions: PredictionFigures) -> dict[str, float]:
    """The measured value that each bar is held against: of layers the worst one."""
    worst = {
        n: min((getattr(row, n) for row in predictions.layers), default=math.nan) for n, _, _ in _BARS[:3]
    }
    return {**worst, "kld_mean": predictions.divergence.kld_mean, "top1": predictions.divergence.top1}


def _predictions(found: PredictionFigures) -> list[str]:
    summary = {key: getattr(found.divergence, key) for key, _ in _FIGURES}
    figures = [(label, _number(summary[key])) for key, label in _FIGURES if math.isfinite(summary[key])]
    layers = [
        (r.layer, *(f"{v:.6g}" for v in (r.cosine_mean, r.cosine_min, r.error, r.routing)))
        for r in found.layers
    ]
    header = ("layer", "mean cosine", "lowest cosine", "error / energy", "same experts")
    return [
        "<h2>Predictions</h2>",
        table(("", ""), figures, "Next-token predictions against the source"),
        figure(
            "cosine",
            pictures.svg(pictures.cosine_by_layer(found.layers)),
            "Distance of the hidden state from the source's after each layer.",
        ),
        fold("Every layer", table(header, layers, "Layers against the source", sortable=True)),
        figure(
            "kld",
            pictures.svg(pictures.kld_histogram(found.kld)),
            "KL divergence of next-token distributions, one value per position.",
        ),
    ]


def _forward(forward: ForwardFigures) -> list[str]:
    worst = min((row.cosine_mean for row in forward.layers), default=math.nan)
    rows = [
        ("positions", f"{forward.positions:,}"),
        ("lowest mean cosine of a layer", f"{worst:.6f}"),
        ("mean KL divergence (nats)", _number(forward.divergence.kld_mean)),
    ]
    title = f"<h2>The kernels on {escaped(forward.device)}</h2>"
    return [title, table(("", ""), rows, "The kernels against the same weights in torch")]


def _fidelity(fidelity: FidelityFigures) -> list[str]:
    what = "Output-weighted" if fidelity.weighted else "Plain weight"
    rows = [
        (
            r.projection,
            "" if r.layer is None else r.layer,
            r.format,
            f"{r.output_snr_db:.2f}",
            f"{r.worst_db:.2f}",
            f"{r.slope:.4f}",
            r.worst,
        )
        for r in fidelity.rows
    ]
    header = ("projection", "layer", "format", "dB", "worst dB", "slope", "worst tensor")
    weakest = sorted(fidelity.rows, key=lambda row: row.worst_db)[:8]
    worst = [(r.worst, r.format, f"{r.worst_db:.1f}", f"{r.slope:.4f}") for r in weakest]
    parts = ["<h2>Fidelity of the weights</h2>"]
    if drawn := _heat_map(fidelity.rows):
        parts.append(figure("snr", drawn, f"{what} signal to noise of the experts' projections, in dB."))
    return [
        *parts,
        table(("tensor", "format", "dB", "slope"), worst, "The weakest tensors", sortable=True),
        fold("Every projection", table(header, rows, f"{what} signal to noise", sortable=True)),
    ]


def _heat_map(rows: Sequence[ProjectionFidelity]) -> str | None:
    """Layers across, experts' projections down: a scale that reached to Q8 would show them in one colour."""
    kept = [r for r in rows if r.layer is not None and r.projection.split(".")[-1] in PROJECTIONS]
    if not kept:
        return None
    names = sorted({r.projection for r in kept})
    layers = sorted({r.layer for r in kept if r.layer is not None})
    grid = np.full((len(names), len(layers)), np.nan)
    for r in kept:
        assert r.layer is not None
        grid[names.index(r.projection), layers.index(r.layer)] = r.output_snr_db
    labels = [name.split(".")[-1] for name in names]
    return pictures.svg(pictures.heat_map(labels, layers, grid))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
