"""Speed of every fit and format beside the compiled reference fit, in one run.

    python benchmarks/encoder.py            # weights/s per core, scaling, a full-width expert slice
    python benchmarks/encoder.py --quick
    python benchmarks/encoder.py --stages   # where the time of the Hessian fit goes

Times are of the thread's own CPU clock, so that a busy machine does not count; medians of several runs. The slice
holds 16 experts of M2.7's width, encoded by the same code as a build.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from mq_quant.awq.from_imatrix import ImatrixLayer
from mq_quant.formats.blocks import BY_NAME, AffineFormat, LloydFormat
from mq_quant.formats.fwht import SIGNS2, rotate
from mq_quant.formats.minimax import ModelConfig
from mq_quant.lloyd import encode
from mq_quant.lloyd.constants import INDEPENDENT
from mq_quant.lloyd.encode import encode_rotated
from mq_quant.lloyd.group import Problem, fit_rows, settle_rows
from mq_quant.lloyd.group_fit import SIGNS, as_stored, expand, initial_levels
from mq_quant.lloyd.hessian.group import from_diagonal
from mq_quant.lloyd.hessian.row import from_weights
from mq_quant.quantize.encode.layer_encoder import LayerEncoder
from mq_quant.quantize.encode.prepared_layer import FitSettings

FORMATS = ("MQ2-Lloyd", "MQ3-Lloyd", "MQ4", "MQ6")
FITS = ("reference", "exact", "hessian")
HIDDEN, INTERMEDIATE, EXPERTS = 3072, 1536, 16


def median_time(
    work: Callable[[], object], runs: int, clock: Callable[[], float] = time.thread_time
) -> float:
    """Median seconds of `work`, after one call that compiles."""
    work()
    times = []
    for _ in range(runs):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def per_core(runs: int) -> list[dict[str, Any]]:
    """Million weights/s of one core: rotated rows of a down matrix of M2.7 to payload, Hessian factors included."""
    rng = np.random.default_rng(0)
    rows = rotate(rng.standard_t(5, (3072, 1536)).astype(np.float32))
    weights = np.exp(rng.normal(0, 1, 1536))
    out = []
    for name in FORMATS:
        fmt = BY_NAME[name]
        speeds = {}
        for fit in FITS:

            def work(fit: Any = fit, fmt: Any = fmt) -> object:
                return encode_rotated(rows, fmt, fit, from_weights(weights) if fit == "hessian" else None)

            speeds[fit] = rows.size / median_time(work, runs) / 1e6
        out.append({"format": name, **speeds})
    return out


def stages_of(fmt: LloydFormat | AffineFormat, runs: int) -> dict[str, Any]:
    """Nanoseconds a weight of each stage of the Hessian fit: one group of 3072 rows under a diagonal importance."""
    rng = np.random.default_rng(0)
    rows = rotate(rng.standard_t(5, (3072, 256)).astype(np.float32))
    weights = np.exp(rng.normal(0, 1, 256))
    h = from_diagonal(weights)
    start = initial_levels(rows, 0, fmt, exact=False)
    levels = expand(fmt, start)
    codes, gains = np.empty((len(rows), 256), np.uint8), np.empty(len(rows), np.float32)
    grid = isinstance(fmt, AffineFormat)
    problem = Problem(h.matrix, h.feedback, h.diagonal, SIGNS2, SIGNS, grid)

    def took(work: Callable[[], object]) -> float:
        return median_time(work, runs) / rows.size * 1e9

    def fit(rounds: int) -> float:
        shakes = np.array(INDEPENDENT[len(INDEPENDENT) - rounds :], np.float32)
        return took(lambda: fit_rows(rows, 0, problem, shakes, levels.copy(), codes))

    first, cold, whole = fit(0), fit(1), fit(len(INDEPENDENT))
    return {
        "format": fmt.name,
        "Hessian": took(lambda: from_diagonal(weights)),
        "initial levels": took(lambda: initial_levels(rows, 0, fmt, exact=False)),
        "feedback, refit": first,
        "warm rounds": whole - cold,
        "cold round": cold - first,
        "settle, gain": took(lambda: settle_rows(rows, 0, problem, levels, codes, gains)),
        "pack": took(lambda: encode._pack(fmt, as_stored(fmt, start), codes)),
    }


def full_width(jobs: int, runs: int, formats: dict[str, str]) -> dict[str, float]:
    """Wall-clock speed of 16 experts of M2.7's width on `jobs` threads, all three projections, the Hessian fit."""
    rng = np.random.default_rng(1)
    config = ModelConfig(2048, HIDDEN, 1, 48, 8, INTERMEDIATE, EXPERTS, 8, 128, 64, 5e6, 1e-6, 4096)
    diagonals = {
        p: np.exp(rng.normal(0, 1, (EXPERTS, k)))
        for p, k in (("w1", HIDDEN), ("w3", HIDDEN), ("w2", INTERMEDIATE))
    }
    diagonals["w3"] = diagonals["w1"]
    counts = {p: np.full(EXPERTS, 1000.0) for p in diagonals}
    importance = ImatrixLayer(0, diagonals, counts, ())
    chosen = {p: BY_NAME[f] for p, f in formats.items()}
    encoder = LayerEncoder(config, 0, importance, chosen, FitSettings(awq_alpha=0.0))
    encoder.prepare({})
    w1 = (0.02 * rng.standard_t(5, (INTERMEDIATE, HIDDEN))).astype(np.float32)
    w2 = (0.02 * rng.standard_t(5, (HIDDEN, INTERMEDIATE))).astype(np.float32)

    def work() -> None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda e: encoder.encode_expert(e, w1, w1, w2), range(EXPERTS)))

    seconds = median_time(work, runs, time.perf_counter)
    return {"jobs": jobs, "weights_per_second": EXPERTS * 3 * w1.size / seconds, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Encoder speed beside the reference fit.")
    parser.add_argument("--quick", action="store_true", help="fewer runs, no full-width slice")
    parser.add_argument("--stages", action="store_true", help="only where the time of the Hessian fit goes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runs = 1 if args.quick else 3
    if args.stages:
        parts = [stages_of(cast(Any, BY_NAME[name]), 7) for name in FORMATS]
        print("| ns a weight | " + " | ".join(k for k in parts[0] if k != "format") + " |")
        print("|" + "---|" * len(parts[0]))
        for part in parts:
            cells = " | ".join(f"{v:.1f}" for k, v in part.items() if k != "format")
            print(f"| {part['format']} | {cells} |")
        return
    speeds = per_core(runs)
    slices = []
    if not args.quick:
        mq2_lloyd = {"w1": "MQ2-Lloyd", "w3": "MQ2-Lloyd", "w2": "MQ4"}
        slices = [full_width(jobs, 1, mq2_lloyd) for jobs in (1, 2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if args.json:
        print(json.dumps({"per_core": speeds, "full_width": slices, "peak_rss_gib": peak}))
        return
    print("| million weights/s per core | " + " | ".join(FITS) + " | hessian / reference |")
    print("|" + "---|" * (len(FITS) + 2))
    for s in speeds:
        cells = " | ".join(f"{s[f]:.1f}" for f in FITS)
        print(f"| {s['format']} | {cells} | {s['hessian'] / s['reference']:.2f} |")
    for s in slices:
        speed = s["weights_per_second"] / 1e6
        print(f"\n16 experts at 3072 × 1536, mq2-lloyd, {s['jobs']} threads: {speed:.1f} million weights/s")
    if len(slices) == 2:
        print(f"two threads / one: {slices[1]['weights_per_second'] / slices[0]['weights_per_second']:.2f}")
    print(f"peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
