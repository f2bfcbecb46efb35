"""Pictures of what was measured, as SVG and PNG. matplotlib is imported only when one is drawn.

They stand on pages of any colour: their ground is transparent, and inks have a contrast of 3.9 or more, to white and to
the dark pages of hubs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .model.metrics import LayerFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREEN = "#767d88", "#3578bd", "#c2571a", "#2a8f58"
WRITTEN = 16
"""Columns of a heat map up to which each value is written out."""
FLOOR = 1e-9
"""The smallest value that a logarithmic axis shows."""


@dataclass(frozen=True)
class Measured:
    """One file in a picture: its name, bytes, mean KLD with standard error, and the tokens it was calibrated on."""

    label: str
    bytes: int
    kld: float
    error: float
    tokens: int | None = None


def kld_by_size(files: Sequence[Measured]) -> Figure:
    """KLD against file size, one point a file, with error bars of two standard errors."""
    figure, axes = new(8, 4.2)
    small = max(f.bytes for f in files) < 1e9
    unit, size = ("MB", 1e6) if small else ("GB", 1e9)
    axes.set(xlabel=f"file size ({unit})", ylabel="mean KL divergence (nats)", yscale="log")
    _points(axes, files, [f.bytes / size for f in files], BLUE)
    return figure


@dataclass(frozen=True)
class Curve:
    """Files of one kind by size: (bytes, mean KLD, name or nothing) of each."""

    label: str
    points: Sequence[tuple[int, float, str]]


def curves_by_size(curves: Sequence[Curve]) -> Figure:
    """KLD against file size, a line for each kind of files; kinds come in pairs, the first of which is dashed."""
    figure, axes = new(8, 4.2)
    small = max(nbytes for curve in curves for nbytes, _, _ in curve.points) < 1e9
    unit, size = ("MB", 1e6) if small else ("GB", 1e9)
    axes.set(xlabel=f"file size ({unit})", ylabel="mean KL divergence (nats)", yscale="log")
    for i, curve in enumerate(curves):
        x = [nbytes / size for nbytes, _, _ in curve.points]
        y = np.maximum([kld for _, kld, _ in curve.points], FLOOR)
        color = (BLUE, ORANGE, GREEN)[i // 2 % 3]
        axes.plot(x, y, "o--" if i % 2 == 0 else "s-", color=color, markersize=5, label=curve.label)
        for at, value, (_, _, name) in zip(x, y, curve.points, strict=True):
            axes.annotate(
                name,
                (at, value),
                xytext=(5, 5),
                textcoords="offset points",
                color=INK,
                fontsize=8,
                parse_math=False,
            )
    _number_axes(axes)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def kld_by_tokens(files: Sequence[Measured]) -> Figure:
    """KLD against the number of calibration tokens, of the files that were calibrated."""
    figure, axes = new(8, 4.2)
    known = [f for f in files if f.tokens]
    axes.set(xlabel="calibration tokens", ylabel="mean KL divergence (nats)", xscale="log", yscale="log")
    _points(axes, known, [float(f.tokens or 0) for f in known], GREEN)
    return figure


def _points(axes: Axes, files: Sequence[Measured], x: Sequence[float], color: str) -> None:
    y = np.maximum([f.kld for f in files], FLOOR)
    two = np.nan_to_num([2 * f.error for f in files])
    below = np.minimum(two, y * 0.95)  # a logarithmic axis has no place for zero
    axes.errorbar(x, y, yerr=[below, two], fmt="o", color=color, ecolor=INK, capsize=4, markersize=7)
    middle = (min(x) + max(x)) / 2
    for f, at, value in zip(files, x, y, strict=True):
        right = at > middle and len(files) > 1  # its name would reach over the edge
        axes.annotate(
            f.label,
            (at, value),
            xytext=(-9 if right else 9, 5),
            textcoords="offset points",
            ha="right" if right else "left",
            color=INK,
            fontsize=9,
            parse_math=False,
        )
    axes.margins(x=0.1, y=0.14)
    _number_axes(axes)


def _number_axes(axes: Axes) -> None:
    """A grid, and plain numbers on both axes, also where they are logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    for axis in (axes.yaxis, axes.xaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda number, _: f"{number:,.6g}")


def error_by_layer(layers: Sequence[LayerFigures]) -> Figure:
    """The squared error of the residual stream behind each layer, as a share of its energy."""
    figure, axes = new(8, 3)
    _lines(axes, layers, {"error of the stream": ([row.error for row in layers], BLUE)})
    axes.set(xlabel="layer", ylabel="squared error / energy", yscale="log")
    return figure


def cosine_by_layer(layers: Sequence[LayerFigures]) -> Figure:
    """One minus the cosine of the residual stream with the source's."""
    figure, axes = new(8, 3)
    means, lowest = [1 - row.cosine_mean for row in layers], [1 - row.cosine_min for row in layers]
    _lines(axes, layers, {"mean": (means, BLUE), "worst position": (lowest, ORANGE)})
    axes.set(xlabel="layer", ylabel="1 − cosine", yscale="log")
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def _lines(axes: Axes, layers: Sequence[LayerFigures], lines: dict[str, tuple[list[float], str]]) -> None:
    from matplotlib.ticker import MaxNLocator

    x = [row.layer for row in layers]
    for label, (values, color) in lines.items():
        y = np.maximum(values, FLOOR)
        axes.plot(x, y, marker="o", markersize=4, color=color, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)


def kld_histogram(values: Sequence[float]) -> Figure:
    """How the KLD is spread over positions."""
    figure, axes = new(8, 3)
    kld = np.maximum(np.asarray(values), FLOOR)
    low, high = np.log10(kld.min()), np.log10(kld.max())
    axes.hist(kld, bins=np.logspace(low - 0.05, high + 0.05, 40).tolist(), color=BLUE)
    axes.axvline(kld.mean(), color=ORANGE, label=f"mean {kld.mean():.4g}")
    axes.axvline(float(np.median(kld)), color=INK, linestyle="--", label=f"median {np.median(kld):.4g}")
    axes.set(xscale="log", xlabel="KL divergence (nats)", ylabel="positions")
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def heat_map(names: Sequence[str], layers: Sequence[int], values: Any) -> Figure:
    """Values f64 [names, layers], names down and layers across; NaN where there is none."""
    figure, axes = new(8, 0.4 * len(names) + 1.2)
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("layer")
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
    if len(layers) <= WRITTEN:
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "white" if value < middle else "black"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=ink)
    bar = figure.colorbar(image, ax=axes, label="dB")
    bar.ax.tick_params(colors=INK)
    bar.ax.yaxis.label.set_color(INK)
    return figure


def new(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, which="both")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    return figure, axes


def svg(figure: Figure) -> str:
    """The picture as an SVG element; the same for the same figures."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mq-quant", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    """The picture as a PNG file, twice as fine as screens once were."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200)
    return out.getvalue()
