"""Does a cheaper quantity rank pieces as their measured loss does? Rank correlation and worst ratio of three of them.

    python benchmarks/pieces.py --source FOLDER --effort calibrated -o out/pieces.json

FOLDER holds calib_tokens.npy, eval_tokens.npy and imatrix.gguf beside the checkpoint. `mq-quant measure` runs as it is;
besides, the squared error of each piece's layer is noted, as a share of the energy of the stream behind the layer. The
result is the measurement, the errors beside it, and two tables. The first holds the error alone, and the same in
proportion, with one format of each piece measured and the others following its error. What adds less than a tenth of
the rest's KLD is left out there: it changes no choice, and is mostly noise. The second holds the sum over all pieces
against whole models.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from unittest import mock

import numpy as np
from mq_quant.formats.machine import cores
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.fit import run
from mq_quant.quantize.fit.before import texts_of
from mq_quant.quantize.fit.measurement import PROJECTIONS, Measurement, whole_formats
from mq_quant.quantize.fit.streams import REST
from mq_quant.quantize.pipeline.statistics import ImatrixFile, OnTheFly
from mq_quant.quantize.spec.places import choose_recipe, open_place
from mq_quant.quantize.write.stream_folder import F32, StreamFolder
from scipy.stats import spearmanr

SMALLEST = 0.1
"""The share of the rest's KLD from which on a loss counts."""
Errors = dict[tuple[int, str], dict[str, float]]


class Noting(StreamFolder):
    """Streams between layers, and the error of each piece behind its own layer by the name of its stream."""

    found: dict[str, float] = {}  # noqa: RUF012
    _source: F32

    def save(self, name: str, layer: int, stream: F32) -> str:
        if name == REST:
            Noting._source = stream.astype(np.float64)
        elif name.startswith("piece") and name not in self.found:
            self.found[name] = float(np.square(stream - self._source).sum() / np.square(self._source).sum())
        return super().save(name, layer, stream)


def measured(folder: Path, effort: str, output: Path, sequences: int) -> tuple[Measurement, Errors]:
    """The measurement of a checkpoint, and the error of each piece in each format."""
    recipe = choose_recipe("mq4", None, str(folder))
    statistics = OnTheFly() if effort == "calibrated" else ImatrixFile(folder / "imatrix.gguf")
    with (
        closing(open_place(str(folder), None, 2, output.parent)) as source,
        mock.patch.object(run, "StreamFolder", Noting),
    ):
        source.validate()
        request = TokenRequest(tokens=folder / "calib_tokens.npy")
        texts = texts_of(source, request, folder / "eval_tokens.npy", sequences, effort == "calibrated")
        options = run.MeasureOptions(output, jobs=cores(), force=True, restart=True)
        found = run.measure(recipe, source, texts, statistics, options).measurement
    errors: Errors = {}
    for number, piece in enumerate(found.pieces):
        names = [f"piece{number * len(found.formats) + i}" for i in range(len(found.formats))]
        notes = (Noting.found[name] for name in names)
        errors[piece.layer, piece.projection] = dict(zip(found.formats, notes, strict=True))
    document = [{"layer": n, "projection": p, "error": of} for (n, p), of in errors.items()]
    output.with_suffix(".errors.json").write_text(json.dumps(document, indent=1))
    return found, errors


def table(found: Measurement, errors: Errors) -> str:
    """Each quantity beside the measured loss, over all pieces and formats."""
    keys = [
        (p.layer, p.projection, f)
        for p in found.pieces
        for f in found.formats
        if found.loss(p.layer, p.projection, f) > SMALLEST * found.rest
    ]
    true = np.array([found.loss(*key) for key in keys])
    error = np.array([errors[layer, projection][f] for layer, projection, f in keys])
    rows = [("error of the layer's output", error * np.exp(np.log(true / error).mean()))]
    for base in found.formats[:-1]:
        scale = [found.loss(n, p, base) / errors[n, p][base] for n, p, _ in keys]
        rows.append((f"{base} measured, others by their error", error * np.array(scale)))
    lines = [f"{len(keys)} of {len(found.pieces) * len(found.formats)} losses", ""]
    lines += ["| quantity | rank correlation | off by at most |", "|---|---|---|"]
    for name, values in rows:
        worst = float(np.exp(np.abs(np.log(values / true)).max()))
        lines.append(f"| {name} | {spearmanr(values, true)[0]:.3f} | × {worst:.1f} |")
    lines += ["", "| gate and up/down | whole, less the rest | sum of pieces | ratio |", "|---|---|---|---|"]
    for name, whole in found.whole.items():
        formats = dict(zip(PROJECTIONS, whole_formats(name), strict=True))
        total = sum(found.loss(p.layer, p.projection, formats[p.projection]) for p in found.pieces)
        lines.append(
            f"| {name} | {whole - found.rest:.5f} | {total:.5f} | {(whole - found.rest) / total:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--effort", choices=("imatrix", "calibrated"), default="calibrated")
    parser.add_argument("--sequences", type=int, default=24, help="of eval_tokens.npy")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/pieces.json"))
    given = parser.parse_args()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    print(table(*measured(given.source, given.effort, given.output, given.sequences)))


if __name__ == "__main__":
    main()
