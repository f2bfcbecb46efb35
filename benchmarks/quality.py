"""Quality at identical bytes: every tier by every fit against the FP8 source, on held-out tokens.

    python benchmarks/quality.py --source tiny -o out/quality
    python benchmarks/quality.py --source FOLDER -o out/quality

FOLDER holds imatrix.gguf and eval_tokens.npy beside the checkpoint, or --imatrix and --tokens name them. Builds each
file with the pipeline, decodes it, runs it through the reference forward, and writes a table (JSON and Markdown) and a
plot of KLD against bytes.
The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mq_quant.awq.from_imatrix import load_importance
from mq_quant.awq.importance import ModelImportance
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import PROJECTIONS, expert_name
from mq_quant.formats.statistics.imatrix import read_imatrix
from mq_quant.quantize.pipeline import build as pipeline
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile, MomentFolder, Statistics
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.tiny.folder import ensure_tiny
from mq_quant.verify.model.hfq_weights import DecodedFile
from mq_quant.verify.model.metrics import Divergence
from mq_quant.verify.model.reference import Weights, layer_by_layer, logits
from mq_quant.verify.stages.fidelity import Fidelity, measure
from quality_rows import plot, table

TIERS = ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mq2-mini")
FITS = {
    "reference": RecipeChanges(fit="reference"),
    "exact": RecipeChanges(fit="exact"),
    "hessian": RecipeChanges(fit="hessian"),
    "hessian, no gain": RecipeChanges(fit="hessian", gain=False),
    "calibrated": RecipeChanges(fit="hessian"),
}


def run(weights: Weights, checkpoint: Checkpoint, tokens: np.ndarray) -> Iterable[torch.Tensor]:
    """Next-token logits [len, vocab] of each sequence."""
    for _, hidden in layer_by_layer(weights, checkpoint.config, tokens):
        last = hidden
    return logits(weights, checkpoint.config, last)


def build_file(out: Path, tier: str, folder: Path, changes: RecipeChanges, statistics: Statistics) -> int:
    """Build a tier at `out`, which may exist; returns its bytes."""
    options = pipeline.RunOptions(out, jobs=os.cpu_count() or 1, force=True)
    return pipeline.build_file(
        choose_recipe(tier, None, str(folder)), statistics, options, changes
    ).total_bytes


def divergence_of(
    weights: Weights, checkpoint: Checkpoint, tokens: np.ndarray, reference: Iterable[torch.Tensor]
) -> dict[str, Any]:
    """KLD, agreement and perplexity of a decoded file's logits against the source's, each sequence in turn."""
    divergence = Divergence()
    for a, b, ids in zip(reference, run(weights, checkpoint, tokens), tokens, strict=True):
        divergence.add(a, b, ids)
    return vars(divergence.summary())


def output_snr(decoded: DecodedFile, checkpoint: Checkpoint, importance: ModelImportance) -> dict[str, float]:
    """Output-weighted SNR (dB) per projection, energies summed over all experts."""
    total: dict[str, Fidelity] = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        of_layer = importance.layer(layer)
        for expert in range(checkpoint.config.num_local_experts):
            for p in PROJECTIONS:
                name = expert_name(layer, expert, p)
                d = of_layer.of(expert, p).diagonal.astype(np.float32)
                one = measure(checkpoint.weight(name), decoded.weight(name), d)
                total[p] = total[p] + one if p in total else one
    return {p: f.output_snr for p, f in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of every tier and fit against the FP8 source.")
    parser.add_argument("--source", default="tiny", help="tiny, or a checkpoint folder")
    parser.add_argument("--imatrix", type=Path, help="default: imatrix.gguf of the source")
    parser.add_argument("--tokens", type=Path, help="default: eval_tokens.npy of the source")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    parser.add_argument(
        "--fits", nargs="+", choices=list(FITS), help="default: all, calibrated if --calibration is given"
    )
    parser.add_argument(
        "--calibration", type=Path, help="folder of mq-quant calibrate, for the calibrated fit"
    )
    parser.add_argument("--sequences", type=int, help="use only the first N sequences")
    parser.add_argument("--alpha", type=float, help="pin the AWQ exponent of the Hessian fits")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/quality"))
    args = parser.parse_args()

    folder = ensure_tiny() if args.source == "tiny" else Path(args.source)
    checkpoint = open_checkpoint(folder)
    imatrix = args.imatrix or folder / "imatrix.gguf"
    tokens = np.load(args.tokens or folder / "eval_tokens.npy")
    tokens = tokens[: args.sequences]
    fits = args.fits or [f for f in FITS if f != "calibrated" or args.calibration]
    importance = load_importance(read_imatrix(imatrix), checkpoint.config)
    reference = list(run(checkpoint, checkpoint, tokens))
    rows = []
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for tier in args.tiers:
            for fit in fits:
                changes = FITS[fit]
                changes = replace(changes, alpha=args.alpha if changes.fit == "hessian" else None)
                given = MomentFolder(args.calibration) if fit == "calibrated" else ImatrixFile(imatrix)
                out = Path(scratch) / "file"
                size = build_file(out, tier, folder, changes, given)
                with open_hfq(out) as file:
                    decoded = DecodedFile(file)
                    judged = divergence_of(decoded, checkpoint, tokens, reference)
                    snr = output_snr(decoded, checkpoint, importance)
                rows.append({"tier": tier, "fit": fit, "bytes": size, "snr": snr} | judged)
                print(table(rows[-1:], "tier").splitlines()[-1], flush=True)
                (args.output / "quality.json").write_text(json.dumps(rows, indent=1))
    (args.output / "quality.json").write_text(json.dumps(rows, indent=1))
    (args.output / "quality.md").write_text(table(rows, "tier") + "\n")
    title = f"{folder.name}: KLD against size, by fit"
    plot(rows, "tier", args.output / "quality.png", title, "file size")


if __name__ == "__main__":
    main()
