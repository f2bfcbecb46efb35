"""KLD against the number of calibration tokens: 1, 2, 4, … sequences, up to all that there are.

    python benchmarks/calibration_tokens.py --source FOLDER -o out/calibration

FOLDER holds calib_tokens.npy, eval_tokens.npy and imatrix.gguf beside the checkpoint. For each number of sequences the
source is calibrated anew, every tier built with it, alone and with the imatrix behind it, and judged on held-out
tokens; the fits that need no calibration are the lines to beat. Writes a table (JSON and Markdown) and a plot.
The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.statistics.moment_file import DOWN_FORMS
from mq_quant.quantize.calibrate.run import CalibrationOptions, calibrate
from mq_quant.quantize.pipeline.statistics import ImatrixFile, MomentFolder, Statistics
from mq_quant.verify.model.hfq_weights import DecodedFile
from quality import FITS, TIERS, build_file, divergence_of, run

LINES = ("reference", "hessian")


def counts(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})


def table(rows: list[dict[str, Any]]) -> str:
    head = "| tier | fit | tokens | KLD mean | median | 99 % | max | top-1 | ppl |"
    lines = [head, "|" + "---|" * 9]
    for r in rows:
        lines.append(
            f"| {r['tier']} | {r['fit']} | {r['calibration_tokens'] or ''} | {r['kld_mean']:.5f} "
            f"| {r['kld_median']:.5f} | {r['kld_p99']:.4f} | {r['kld_max']:.3f} | {r['top1']:.4f} "
            f"| {r['ppl_test']:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves, levels = defaultdict(list), {}
    for r in rows:
        key = (r["tier"], r["fit"])
        if r["calibration_tokens"]:
            curves[key].append((r["calibration_tokens"], r["kld_mean"]))
        else:
            levels[key] = r["kld_mean"]
    tiers = list(dict.fromkeys(tier for tier, _ in curves))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (tier, fit), points in curves.items():
        dashed = "imatrix" in fit
        style = {"linestyle": "--", "marker": "s", "markerfacecolor": "white"} if dashed else {"marker": "o"}
        axes.plot(*zip(*points, strict=True), color=f"C{tiers.index(tier)}", label=f"{tier}, {fit}", **style)
    most = max(p[0] for points in curves.values() for p in points)
    for (tier, fit), kld in levels.items():
        axes.axhline(kld, color=f"C{tiers.index(tier)}", linestyle=":", linewidth=1)
        axes.annotate(
            f"{tier}, {fit}", (most, kld), textcoords="offset points", xytext=(0, 3), ha="right", fontsize=8
        )
    axes.set(xscale="log", yscale="log", xlabel="calibration tokens", title=title)
    axes.set_ylabel("mean KLD to the FP8 source (nats)")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--imatrix", type=Path, help="default: imatrix.gguf of the source")
    parser.add_argument("--calibration-tokens", type=Path, help="default: calib_tokens.npy of the source")
    parser.add_argument("--tokens", type=Path, help="default: eval_tokens.npy of the source")
    parser.add_argument("--tiers", nargs="+", default=["mq2", "mq4"], choices=TIERS)
    parser.add_argument("--down", default="compact", choices=DOWN_FORMS)
    parser.add_argument("--counts", nargs="+", type=int, help="numbers of calibration sequences")
    parser.add_argument("--sequences", type=int, help="judge on the first N held-out sequences only")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/calibration"))
    args = parser.parse_args()

    folder: Path = args.source
    checkpoint = open_checkpoint(folder)
    imatrix = args.imatrix or folder / "imatrix.gguf"
    gathered = np.load(args.calibration_tokens or folder / "calib_tokens.npy").astype(np.int32)
    tokens = np.load(args.tokens or folder / "eval_tokens.npy")[: args.sequences]
    reference = list(run(checkpoint, checkpoint, tokens))
    rows: list[dict[str, Any]] = []
    args.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as scratch:

        def judge(tier: str, fit: str, seen: int, given: Statistics) -> None:
            out = Path(scratch) / "file"
            size = build_file(out, tier, folder, FITS.get(fit, FITS["calibrated"]), given)
            with open_hfq(out) as file:
                judged = divergence_of(DecodedFile(file), checkpoint, tokens, reference)
            rows.append({"tier": tier, "fit": fit, "calibration_tokens": seen, "bytes": size} | judged)
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            (args.output / "tokens.json").write_text(json.dumps(rows, indent=1))

        print("\n".join(table([]).splitlines()))
        for tier in args.tiers:
            for fit in LINES:
                judge(tier, fit, 0, ImatrixFile(imatrix))
        for count in args.counts or counts(len(gathered)):
            calib, used = Path(scratch) / f"calib-{count}", gathered[:count]
            calibrate(checkpoint, used, calib, CalibrationOptions(args.down))
            for tier in args.tiers:
                judge(tier, "calibrated", used.size, MomentFolder(calib))
                judge(tier, "calibrated + imatrix", used.size, MomentFolder(calib, imatrix))
    (args.output / "tokens.md").write_text(table(rows) + "\n")
    plot(rows, args.output / "tokens.png", f"{folder.name}: KLD against calibration tokens")


if __name__ == "__main__":
    main()
