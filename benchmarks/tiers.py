"""What several tiers in one pass cost beside one tier alone: processor time of experts at M2.7's width, in one run.

    python benchmarks/tiers.py                                  # all six tiers beside mq3-lloyd, under an imatrix
    python benchmarks/tiers.py --effort calibrated --timed 1
    python benchmarks/tiers.py --effort imatrix --tier mq2 --tier mq3 --runs 5

Reading, dequantising and encoding of some experts of one layer are timed on one thread, by the functions of a build;
so are the search for the layer's exponents, in proportion to 256 experts, and, where the build calibrates itself, the
run of the source. With 8 experts 2048 tokens give each as many rows as 65,536 tokens do in M2.7. The median ratio of
`--runs` is printed, each of which times both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: its threads would count as well

import numpy as np
from full_width_build import write_checkpoint
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.encode.blas import one_blas_thread
from mq_quant.quantize.pipeline.build_spec import open_builds
from mq_quant.quantize.pipeline.encoding import encode_block, in_blocks, in_step, prepare_layers
from mq_quant.quantize.pipeline.statistics import ImatrixFile, OnTheFly, Statistics
from mq_quant.quantize.pipeline.work_units import work_order
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.spec.recipe import tiers as tier_names

LONE = "mq3-lloyd"
EXPERTS, RELEASED, VOCABULARY, LENGTH = 8, 256, 2048, 512


@one_blas_thread()
def seconds(
    tiers: Sequence[str], statistics: Statistics, source: Path, timed: int
) -> tuple[float, float, float]:
    """Processor seconds for each expert: the run of the source, the search for exponents, and the encoding."""
    clock, parts = time.process_time, []
    recipes = [choose_recipe(tier, None, str(source)) for tier in tiers]
    with open_builds(recipes, statistics) as specs, tempfile.TemporaryDirectory() as folder:
        by_number = dict(enumerate(specs))
        began, gathered = clock(), specs[0].gathered
        if gathered is not None:
            gathered.open(Path(folder) / "moments")
            gathered.begin_layer(0)
        parts.append((clock() - began) / EXPERTS)
        began = clock()
        encoders = prepare_layers(by_number, 0)
        parts.append((clock() - began) / RELEASED)
        orders = {
            n: [unit for unit in work_order(spec) if unit.expert is not None] for n, spec in by_number.items()
        }
        began = clock()
        for block in in_blocks(by_number, in_step(orders[0], orders)[:timed]):
            encode_block(by_number, block, encoders)
        parts.append((clock() - began) / timed)
        if gathered is not None:
            gathered.close()
    return parts[0], parts[1], parts[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--effort", default="imatrix", choices=("imatrix", "calibrated"))
    parser.add_argument("--tier", action="append", help="by default all of them")
    parser.add_argument("--timed", type=int, default=2, help="experts that are encoded")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    several = given.tier or tier_names()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "full-width"
        source.mkdir()
        write_checkpoint(source, 1, EXPERTS, vocab_size=VOCABULARY)
        ids = np.random.default_rng(1).integers(0, VOCABULARY, (2048 // LENGTH, LENGTH))
        np.save(source / "tokens.npy", ids.astype(np.int32))
        under: Statistics = ImatrixFile(source / "imatrix.gguf")
        if given.effort == "calibrated":
            under = OnTheFly(TokenRequest(tokens=source / "tokens.npy"))
        print(f"{given.effort}, processor seconds for each expert\n")
        print("| | source | search | encoding | together |\n|---|---|---|---|---|")
        ratios = []
        for run in range(given.runs + 1):  # the first one compiles
            alone, together = (seconds(tiers, under, source, given.timed) for tiers in ([LONE], several))
            if run == 0 and given.runs > 1:
                continue
            for what, parts in ((LONE, alone), (f"{len(several)} tiers", together)):
                print(
                    f"| {what} | {' | '.join(f'{part:.2f}' for part in (*parts, sum(parts)))} |", flush=True
                )
            ratios.append(sum(together) / sum(alone))
        print(f"\nmedian of {len(ratios)}: {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    main()
