"""Files fitted to a size beside the tiers: KLD at each tier's own bytes, and at twelve sizes from mq2-mini to mq4.

    python benchmarks/fit.py FOLDER -o out/fit

FOLDER is a checkpoint with calib_tokens.npy, eval_tokens.npy and imatrix.gguf beside it, or options name others. For
each effort the model is measured on every other sequence of the evaluation tokens, and what is chosen by that is
compared with the tiers on all of them, in one pass, with the pieces that a build of that effort has: the figures are
those that `mq-quant evaluate` says of built files. What was expected is held against the sequences that were measured
on. A table (JSON and Markdown) and a picture come out. A run that is interrupted continues after the last finished
layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from mq_quant.formats.machine import cores
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.fit.allocation import Allocation, allocation_of
from mq_quant.quantize.fit.before import Texts
from mq_quant.quantize.fit.budget import Budget
from mq_quant.quantize.fit.losses import measured
from mq_quant.quantize.fit.measurement import read_measurement
from mq_quant.quantize.fit.pieces import Choice
from mq_quant.quantize.fit.request import FitRequest, fit
from mq_quant.quantize.fit.run import MeasureOptions, losses_of, measure
from mq_quant.quantize.fit.streams import Streams
from mq_quant.quantize.pipeline.statistics import ImatrixFile, OnTheFly, Statistics
from mq_quant.quantize.spec.estimates import tier_table
from mq_quant.quantize.spec.places import choose_recipe, open_place
from mq_quant.quantize.spec.recipe import tiers
from mq_quant.verify.pictures import Curve, curves_by_size, png, svg

BUDGETS = 12
EVERY = 2
"""One in so many sequences of the evaluation tokens is measured on."""


class Model:
    """A checkpoint, its tokens, and what is run of it at one effort."""

    def __init__(self, args: argparse.Namespace, effort: str) -> None:
        folder: Path = args.folder
        self.source, self.effort = str(folder), effort
        calibrating = np.load(args.tokens or folder / "calib_tokens.npy").astype(np.int32)
        evaluating = np.load(args.judge_tokens or folder / "eval_tokens.npy").astype(np.int32)
        self.measuring = Texts(calibrating, evaluating[::EVERY], None)
        self.judging = Texts(calibrating, evaluating, None)
        imatrix = args.imatrix or folder / "imatrix.gguf"
        self.statistics: Statistics = ImatrixFile(imatrix)
        if effort == "calibrated":
            request = TokenRequest(tokens=args.tokens or folder / "calib_tokens.npy")
            self.statistics = OnTheFly(request, imatrix=imatrix if imatrix.exists() else None)
        self.recipe = choose_recipe("mq2", None, self.source)
        self.output: Path = args.output
        self.jobs: int = args.jobs

    def measurement(self) -> Path:
        """The file of the measurement, made where it is not there."""
        path = self.output / f"measurement-{self.effort}.json"
        if not path.exists():
            with closing(open_place(self.source, None, 2, self.output)) as source:
                source.validate()
                options = MeasureOptions(path, jobs=self.jobs)
                measure(self.recipe, source, self.measuring, self.statistics, options)
        return path

    def divergences(self, allocations: list[Allocation]) -> Iterator[tuple[float, float]]:
        """The KLD of files with these formats, on all sequences and on those that were measured on."""
        wholes = tuple(tuple(Choice(*formats) for formats in a.layers) for a in allocations)
        with closing(open_place(self.source, None, 2, self.output)) as source:
            source.validate()
            plan = Streams(source.config, (), wholes)
            options = MeasureOptions(self.output / f"files-{self.effort}", jobs=self.jobs)
            run = losses_of(self.recipe, source, self.judging, self.statistics, plan, options)
            with run as found:
                for i in range(len(wholes)):
                    kld = found.divergences[f"whole{i}"].reshape(len(self.judging.judging), -1)
                    yield float(kld.mean()), float(kld[::EVERY].mean())


def rows_of(model: Model) -> Iterator[dict[str, Any]]:
    """A row for each tier and for each budget: its bytes, and what a tier and a fit of them are expected to lose and
    lose.
    """
    path = model.measurement()
    losses = measured(read_measurement(path))
    with closing(open_place(model.source, None, 2, model.output)) as source:
        config = source.config
    rows = [row for row in tier_table(model.source).tiers if row.tier in tiers()]
    sizes = {row.tier: row.total_bytes for row in sorted(rows, key=lambda row: row.total_bytes)}
    low, high = min(sizes.values()), max(sizes.values())
    budgets = {f"budget {i + 1}": low + i * (high - low) // (BUDGETS - 1) for i in range(BUDGETS)}
    own = {tier: allocation_of(choose_recipe(tier, None, model.source), config) for tier in sizes}
    fits = {
        name: fit(FitRequest(model.source, None, Budget("size", Decimal(size), f"{size}B"), path))
        for name, size in {**sizes, **budgets}.items()
    }
    wanted = list(dict.fromkeys([*own.values(), *(f.allocation for f in fits.values())]))
    klds = dict(zip(wanted, model.divergences(wanted), strict=True))
    for name, found in fits.items():
        row = {
            "name": name,
            "effort": model.effort,
            "limit": found.limit,
            "bytes": found.total_bytes,
            "formats": found.allocation.layers,
            "expected": found.expected_kld,
            "kld": klds[found.allocation][0],
            "kld_there": klds[found.allocation][1],
        }
        if name in own:
            row |= {"tier_kld": klds[own[name]][0], "tier_expected": losses.expected(own[name])}
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| size | effort | bytes | tier | fit | gain | expected | found there | off |", "|" + "---|" * 9]
    for r in rows:
        tier = r.get("tier_kld")
        own, gain = ("", "") if tier is None else (f"{tier:.5f}", f"{1 - r['kld'] / tier:.1%}")
        found = [f"{r[key]:.5f}" for key in ("kld", "expected", "kld_there")]
        off = f"{r['expected'] / r['kld_there'] - 1:+.1%}"
        cells = (r["name"], r["effort"], str(r["limit"]), own, found[0], gain, *found[1:], off)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(rows: list[dict[str, Any]]) -> list[Curve]:
    """For each effort the tiers and the fits, by their bytes."""
    out = []
    for effort in dict.fromkeys(r["effort"] for r in rows):
        mine = [r for r in rows if r["effort"] == effort]
        tiers = [(r["limit"], r["tier_kld"], r["name"]) for r in mine if "tier_kld" in r]
        fits = sorted({(r["bytes"], r["kld"], "") for r in mine})
        out += [Curve(f"tiers, {effort}", tiers), Curve(f"fitted, {effort}", fits)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Fitted files beside the tiers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--efforts", nargs="+", default=["imatrix", "calibrated"])
    parser.add_argument("--tokens", type=Path, help="default: calib_tokens.npy of the folder")
    parser.add_argument("--judge-tokens", type=Path, help="default: eval_tokens.npy of the folder")
    parser.add_argument("--imatrix", type=Path, help="default: imatrix.gguf of the folder")
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("-o", "--output", type=Path, default=Path("out/fit"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for effort in args.efforts:
        rows += rows_of(Model(args, effort))
        write(rows, args.output)
    print(table(rows))


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table and the picture of what is known so far."""
    (folder / "fit.json").write_text(json.dumps(rows, indent=1))
    (folder / "fit.md").write_text(table(rows) + "\n")
    figure = curves_by_size(curves(rows))
    (folder / "fit.png").write_bytes(png(figure))
    (folder / "fit.svg").write_text(svg(figure), encoding="utf-8")


if __name__ == "__main__":
    main()
