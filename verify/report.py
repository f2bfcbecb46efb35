"""A verdict as one self-contained HTML page: the stages, their figures, and plots as inline SVG.

Everything that comes from a file is escaped. Depends on matplotlib, which is imported only here.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.errors import BackendError, OutputError

Verdict = Mapping[str, Any]
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


def check_report(path: Path) -> None:
    """Before the work: BackendError where matplotlib is missing, OutputError where the page's folder is."""
    if find_spec("matplotlib") is None:
        raise BackendError("--report needs matplotlib", hint="pip install matplotlib")
    if not path.parent.is_dir():
        raise OutputError(f"no such folder: {path.parent}", hint="make it, or give --report another path")


def render(verdict: Verdict) -> str:
    """The page for a verdict's JSON; `check_report` comes first."""
    stages = {stage["stage"]: stage for stage in verdict["stages"]}
    word, kind = ("passed", "ok") if verdict["ok"] else ("failed", "bad")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width">',
        f"<title>{escape(str(verdict['path']))}: {word}</title><style>{_STYLE}</style>",
        f"<h1>{escape(str(verdict['path']))}: <span class={kind}>{word}</span></h1>",
        _overview(verdict),
    ]
    if "forward" in stages:
        parts += _forward(stages["forward"])
    if stages.get("fidelity", {}).get("rows"):
        parts += _fidelity(stages["fidelity"])
    if "text" in stages.get("generation", {}):
        made = stages["generation"]
        parts.append(f"<h2>Greedy continuation</h2><p class=note>after: {escape(made['prompt'][-400:])}</p>")
        parts.append(f"<blockquote>{escape(made['text'])}</blockquote>")
    return "\n".join(parts) + "\n"


def _overview(verdict: Verdict) -> str:
    rows = [
        (s["stage"], "ok" if s["ok"] else "failed", f"{s['seen']:,} {s['unit']}", f"{s['seconds']:.1f} s")
        for s in verdict["stages"]
    ]
    rows += [(name, "skipped", why, "") for name, why in verdict["skipped"].items()]
    out = [_table(("stage", "result", "looked at", "time"), rows)]
    for stage in verdict["stages"]:
        if stage["problems"]:
            items = "".join(f"<li>{escape(problem)}</li>" for problem in stage["problems"])
            more = stage["problem_count"] - len(stage["problems"])
            items += f"<li>and {more} more</li>" if more else ""
            out.append(f"<p><b>{escape(stage['stage'])}</b></p><ul class=bad>{items}</ul>")
        out += [f"<p class=note>{escape(stage['stage'])}: {escape(note)}</p>" for note in stage["notes"]]
    return "\n".join(out)


def _forward(stage: Mapping[str, Any]) -> list[str]:
    if "layers" not in stage:
        return []
    figures = [(label, _number(stage[key])) for key, label in _FIGURES if stage.get(key) is not None]
    return [
        f"<h2>Forward pass on {escape(str(stage['device']))}</h2>",
        _table(("against the source", ""), figures),
        _figure(
            "cosine", _plot_cosine(stage["layers"]), "Hidden state after each layer, against the source's."
        ),
        _figure(
            "kld",
            _plot_kld(stage["kld"]),
            "KL divergence of next-token distributions, one value per position.",
        ),
    ]


def _fidelity(stage: Mapping[str, Any]) -> list[str]:
    rows = stage["rows"]
    what = "Output-weighted" if stage["weighted"] else "Plain weight"
    worst = sorted(rows, key=lambda row: row["worst_db"])[:8]
    table = [(r["worst"], r["format"], f"{r['worst_db']:.1f}", f"{r['slope']:.4f}") for r in worst]
    return [
        "<h2>Fidelity of the weights</h2>",
        _figure("snr", _plot_snr(rows), f"{what} signal to noise of each projection, in dB."),
        "<p>The weakest tensors:</p>",
        _table(("tensor", "format", "dB", "slope of its projection"), table),
    ]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cells(row: Sequence[object], tag: str) -> str:
        numeric = [str(cell)[:1].isdigit() and i > 0 for i, cell in enumerate(row)]
        marks = [" class=n" if n else "" for n in numeric]
        return "".join(f"<{tag}{m}>{escape(str(c))}</{tag}>" for m, c in zip(marks, row, strict=True))

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


def _plot_cosine(layers: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = _new(8, 3)
    x = [row["layer"] for row in layers]
    for key, label, color in (("cosine_mean", "mean", _BLUE), ("cosine_min", "minimum", _ORANGE)):
        distance = [max(1 - row[key], 1e-9) for row in layers]
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


def _plot_snr(rows: Sequence[Mapping[str, Any]]) -> str:
    """Layers across, projections down: those that are quantised, experts first."""
    kept = [r for r in rows if r["layer"] is not None and r["format"] not in ("F16", "F32")]
    names = sorted({r["projection"] for r in kept}, key=lambda name: (len(name) > 2, name))
    layers = sorted({r["layer"] for r in kept})
    grid = np.full((len(names), len(layers)), np.nan)
    for r in kept:
        grid[names.index(r["projection"]), layers.index(r["layer"])] = r["output_snr_db"]
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
