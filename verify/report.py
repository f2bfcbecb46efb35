"""A verification as one self-contained HTML page: the stages, their figures, and plots as inline SVG.

Everything that comes from a file is escaped. matplotlib is imported only here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.errors import BackendError, OutputError
from ..formats.text import printable
from .model.metrics import LayerFigures
from .run import Verification
from .stages.fidelity import FidelityFigures, ProjectionFidelity
from .stages.forward_parity import ForwardFigures
from .stages.generation import Continuation
from .stages.stage import LISTED

PROMPT_SHOWN = 400
"""Characters of the prompt, its last ones, that stand above a continuation."""
FLOATS = ("F16", "F32")
_BLUE, _ORANGE, _GREY = "#2563a8", "#c2571a", "#8a8f98"
_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #e2e5ea }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .2rem .8rem .2rem 0; text-align: left }
th { font-weight: 600; color: #5a6270 }
td.n, th.n { text-align: right }
.ok { color: #1a7f4b } .bad { color: #b3261e } ul.bad { padding-left: 1.1rem; overflow-wrap: anywhere }
p.note, figcaption { color: #5a6270; font-size: .85rem }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
blockquote { border-left: 3px solid #e2e5ea; margin: 1rem 0; padding-left: 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
.wide { overflow-x: auto }
"""
_FIGURES = (
    ("kld_mean", "KL divergence, mean (nats)"),
    ("kld_median", "median"),
    ("kld_p99", "99 %"),
    ("kld_max", "maximum"),
    ("top1", "top-1 agreement"),
    ("ppl_reference", "perplexity of the source"),
    ("ppl_test", "perplexity of the file"),
    ("positions", "positions"),
)
"""What is shown of the KL divergence's summary; a figure that is not finite is left out."""


def check_report(path: Path) -> None:
    """Before the work: BackendError where matplotlib is missing, OutputError where the page's folder is."""
    if find_spec("matplotlib") is None:
        raise BackendError("--report needs matplotlib", hint="pip install matplotlib")
    if not path.parent.is_dir():
        raise OutputError(f"no such folder: {path.parent}", hint="make it, or give --report another path")


def render(verification: Verification) -> str:
    """The page; `check_report` comes first."""
    word, kind = ("passed", "ok") if verification.ok else ("failed", "bad")
    path = _escaped(verification.path)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width">',
        f"<title>{path}: {word}</title><style>{_STYLE}</style>",
        f"<h1>{path}: <span class={kind}>{word}</span></h1>",
        _overview(verification),
    ]
    if forward := verification.figures(ForwardFigures):
        parts += _forward(forward)
    if (fidelity := verification.figures(FidelityFigures)) and fidelity.rows:
        parts += _fidelity(fidelity)
    made = verification.figures(Continuation)
    if made and made.text is not None:
        prompt = _escaped((made.prompt or "")[-PROMPT_SHOWN:], keep="\n")
        parts.append(f"<h2>Greedy continuation</h2><p class=note>after: {prompt}</p>")
        parts.append(f"<blockquote>{_escaped(made.text, keep=chr(10))}</blockquote>")
    return "\n".join(parts) + "\n"


def _escaped(text: object, keep: str = "") -> str:
    return escape(printable(str(text), keep=keep))


def _overview(verification: Verification) -> str:
    rows = [
        (s.name, "ok" if s.ok else "failed", f"{s.seen:,} {s.unit}", f"{verification.seconds[s.name]:.1f} s")
        for s in verification.stages
    ]
    rows += [(name, "skipped", why, "") for name, why in verification.skipped.items()]
    out = [_table(("stage", "result", "looked at", "time"), rows)]
    for stage in verification.stages:
        if stage.complaints:
            items = "".join(f"<li>{_escaped(problem)}</li>" for problem in stage.complaints[:LISTED])
            more = len(stage.complaints) - LISTED
            items += f"<li>and {more} more</li>" if more > 0 else ""
            out.append(f"<p><b>{_escaped(stage.name)}</b></p><ul class=bad>{items}</ul>")
        out += [f"<p class=note>{_escaped(stage.name)}: {_escaped(note)}</p>" for note in stage.notes]
    return "\n".join(out)


def _forward(forward: ForwardFigures) -> list[str]:
    summary = {key: getattr(forward.divergence, key) for key, _ in _FIGURES}
    figures = [(label, _number(summary[key])) for key, label in _FIGURES if math.isfinite(summary[key])]
    return [
        f"<h2>Forward pass on {_escaped(forward.device)}</h2>",
        _table(("against the source", ""), figures),
        _figure(
            "cosine", _plot_cosine(forward.layers), "Hidden state after each layer, against the source's."
        ),
        _figure(
            "kld",
            _plot_kld(forward.kld),
            "KL divergence of next-token distributions, one value per position.",
        ),
    ]


def _fidelity(fidelity: FidelityFigures) -> list[str]:
    what = "Output-weighted" if fidelity.weighted else "Plain weight"
    worst = sorted(fidelity.rows, key=lambda row: row.worst_db)[:8]
    table = [(r.worst, r.format, f"{r.worst_db:.1f}", f"{r.slope:.4f}") for r in worst]
    return [
        "<h2>Fidelity of the weights</h2>",
        _figure("snr", _plot_snr(fidelity.rows), f"{what} signal to noise of each projection, in dB."),
        "<p>The weakest tensors:</p>",
        _table(("tensor", "format", "dB", "slope of its projection"), table),
    ]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cells(row: Sequence[object], tag: str) -> str:
        numeric = [str(cell)[:1].isdigit() and i > 0 for i, cell in enumerate(row)]
        marks = [" class=n" if n else "" for n in numeric]
        return "".join(f"<{tag}{m}>{_escaped(c)}</{tag}>" for m, c in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{cells(header, 'th')}</tr>{body}</table></div>"


def _figure(name: str, svg: str, caption: str) -> str:
    return f"<figure id={name}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


# --- plots ----------------------------------------------------------------------------------------------------------


def _new(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mq-quant", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _plot_cosine(layers: Sequence[LayerFigures]) -> str:
    figure, axes = _new(8, 3)
    x = [row.layer for row in layers]
    means, minima = [row.cosine_mean for row in layers], [row.cosine_min for row in layers]
    for cosines, label, color in ((means, "mean", _BLUE), (minima, "minimum", _ORANGE)):
        distance = [max(1 - cosine, 1e-9) for cosine in cosines]
        axes.plot(x, distance, marker="o", markersize=4, color=color, label=label)
    axes.set(xlabel="layer", ylabel="1 - cosine", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e2e5ea")
    axes.legend(frameon=False)
    return _svg(figure)


def _plot_kld(values: Sequence[float]) -> str:
    figure, axes = _new(8, 3)
    kld = np.maximum(np.asarray(values), 1e-9)
    low, high = np.log10(kld.min()), np.log10(kld.max())
    axes.hist(kld, bins=np.logspace(low - 0.05, high + 0.05, 40), color=_BLUE)
    axes.axvline(kld.mean(), color=_ORANGE, label=f"mean {kld.mean():.4g}")
    axes.axvline(np.median(kld), color=_GREY, linestyle="--", label=f"median {np.median(kld):.4g}")
    axes.set(xscale="log", xlabel="KL divergence (nats)", ylabel="positions")
    axes.legend(frameon=False)
    return _svg(figure)


def _plot_snr(rows: Sequence[ProjectionFidelity]) -> str:
    """Layers across, projections down: those that are quantised, experts first."""
    kept = [(r.projection, r.layer, r) for r in rows if r.layer is not None and r.format not in FLOATS]
    names = sorted({name for name, _, _ in kept}, key=lambda name: (len(name) > 2, name))
    layers = sorted({layer for _, layer, _ in kept})
    grid = np.full((len(names), len(layers)), np.nan)
    for name, layer, r in kept:
        grid[names.index(name), layers.index(layer)] = r.output_snr_db
    figure, axes = _new(8, 0.4 * len(names) + 1.2)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(names)), [name.split(".")[-1] for name in names])
    axes.set_xlabel("layer")
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    if grid.size <= 200:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ink = "white" if value < middle else "black"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=axes, label="dB")
    return _svg(figure)
