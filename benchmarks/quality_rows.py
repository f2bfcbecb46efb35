"""The rows that the quality benches measure, as a table and as a plot of KLD against bytes, one line per fit.

A row names what was built, under the key that the bench gives, and holds its `fit` and `bytes`, the output-weighted SNR
by projection as `snr`, and the fields of verify.metrics' summary.
The plot needs matplotlib.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

SNR = ("w1", "w3", "w2")
"""Gate, up and down."""


def table(rows: list[dict[str, Any]], key: str) -> str:
    head = (
        f"| {key} | fit | bytes | gate dB | up dB | down dB | KLD mean | median | 99 % | max | top-1 | ppl |"
    )
    lines = [head, "|" + "---|" * 12]
    for r in rows:
        snr = " | ".join(f"{r['snr'][p]:.2f}" for p in SNR)
        kld = f"{r['kld_mean']:.5f} | {r['kld_median']:.5f} | {r['kld_p99']:.4f} | {r['kld_max']:.3f}"
        lines.append(
            f"| {r[key]} | {r['fit']} | {r['bytes']} | {snr} | {kld} | {r['top1']:.4f} | {r['ppl_test']:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], key: str, path: Path, title: str, size: str) -> None:
    """Write the plot as PNG; `size` says what the bytes are of."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = defaultdict(list)
    for r in rows:
        lines[r["fit"]].append((r["bytes"] / 1e6, r["kld_mean"], r[key]))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for fit, points in lines.items():
        points.sort()
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=fit)
    for megabytes, kld, name in lines[next(iter(lines))]:
        axes.annotate(name, (megabytes, kld), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.margins(x=0.15)
    axes.set(yscale="log", xlabel=f"{size} (MB)", ylabel="mean KLD to the source (nats)", title=title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
