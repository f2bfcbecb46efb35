"""Speed of the encoder on a GPU beside one core of the CPU's, in one run, and whether their bytes are equal.

    python benchmarks/device_encoder.py --device cuda            # every format and fit, then a slice of a layer
    python benchmarks/device_encoder.py --device cuda --kernels  # where the device's time goes

Down matrices of M2.7 (3072 × 1536), scaled, rotated, their Hessians made and their groups encoded: from weights and to
payloads in the machine's memory; as many threads as a build has ask the device, one a core. The slice is what a build
does with 16 experts that lie in memory as FP8, on all cores. Wall-clock medians, the CPU's of its thread's own clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from mq_quant.awq.from_imatrix import ImatrixLayer
from mq_quant.awq.importance import Importance
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.fp8 import dequantize, quantize
from mq_quant.formats.hfq.stored import StoredForm
from mq_quant.formats.minimax import ModelConfig
from mq_quant.kernels.encode.device_encoder import DeviceEncoder
from mq_quant.kernels.runtime.host import Backend, open_backend
from mq_quant.quantize.encode.encoders import CPU, Encoder, MatrixTask
from mq_quant.quantize.encode.gpu_encoder import GpuEncoder
from mq_quant.quantize.encode.layer_encoder import LayerEncoder
from mq_quant.quantize.encode.prepared_layer import FitSettings, hessian_of
from mq_quant.quantize.spec.calibration_sizes import GPU_STREAMS
from numpy.typing import NDArray

FORMATS = ("MQ2-Lloyd", "MQ3-Lloyd", "MQ4", "MQ6")
FITS = ("exact", "hessian", "calibrated")
HIDDEN, INTERMEDIATE, EXPERTS = 3072, 1536, 16
MATRICES, CPU_RUNS = 32, 3
SHAPE = (HIDDEN, INTERMEDIATE)


def median(work: Callable[[], object], runs: int, clock: Callable[[], float]) -> float:
    """Median seconds of `work`, after one call that compiles."""
    work()
    times = []
    for _ in range(runs):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def importance(fit: str, columns: int, seed: int = 0) -> Importance:
    """Unequal channels; for `calibrated` with their correlations."""
    rng = np.random.default_rng(seed)
    diagonal = np.exp(rng.normal(0, 1, columns))
    if fit != "calibrated":
        return Importance(diagonal, count=1000.0)
    mix = np.eye(columns) + rng.normal(0, 0.3 / np.sqrt(columns), (columns, columns))
    moment = (mix * diagonal) @ mix.T
    return Importance(np.diag(moment).copy(), moment, 1000.0)


def matrices(
    device: Encoder, size: tuple[int, int], runs: int, formats: list[str], jobs: int
) -> list[dict[str, Any]]:
    """Weights/s of each format and fit: 32 matrices on the device, asked for by `jobs` threads, and one on one core."""
    rng = np.random.default_rng(1)
    weights = (0.02 * rng.standard_t(5, size)).astype(np.float32)
    scale = np.exp(rng.normal(0, 0.3, size[1])).astype(np.float32)
    out = []
    for name, fit in ((name, fit) for name in formats for fit in FITS):
        given = None if fit == "exact" else importance(fit, size[1])
        # The factors of a dense Hessian are LAPACK's on the CPU in both cases, and left out.
        dense = hessian_of(given, scale) if given and given.moment is not None else None
        kind: Any = "exact" if given is None else "hessian"

        def one(
            encoder: Encoder, name: str = name, kind: Any = kind, given: Any = given, dense: Any = dense
        ) -> NDArray[np.uint8]:
            hessian = dense or (hessian_of(given, scale) if given else None)
            form = StoredForm(BY_NAME[name], scale)
            task = MatrixTask(weights, form, kind, hessian, float(given is not None))
            return encoder.encode([task])[0]

        def many(one: Any = one) -> list[bool]:
            with ThreadPoolExecutor(jobs) as pool:
                return list(pool.map(lambda _: one(device) is not None, range(MATRICES)))

        equal = np.array_equal(one(device), one(CPU))
        fast = median(many, runs, time.perf_counter) / MATRICES
        slow = median(lambda one=one: one(CPU), CPU_RUNS, time.thread_time)  # type: ignore[misc]
        row = {"format": name, "fit": fit, "device": weights.size / fast, "core": weights.size / slow}
        out.append(row | {"ratio": slow / fast, "equal": equal})
        print(
            f"{name:10} {fit:10} {row['device'] / 1e6:9.1f} M/s {row['core'] / 1e6:7.2f} M/s per core "
            f"{slow / fast:7.1f} x  {'equal bytes' if equal else 'DIFFERENT BYTES'}",
            flush=True,
        )
    return out


def kernel_times(backend: Backend, size: tuple[int, int], formats: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of each kernel for one matrix, by format and fit."""
    rng = np.random.default_rng(1)
    weights = (0.02 * rng.standard_t(5, size)).astype(np.float32)
    launch = backend.launch
    marks: list[tuple[str, Any, Any]] = []

    def timed(kernel: Any, *args: Any, **kw: Any) -> None:
        first = backend.mark()
        launch(kernel, *args, **kw)
        marks.append((kernel.name, first, backend.mark()))

    out = {}
    for name in formats:
        for fit in FITS:
            given = None if fit == "exact" else importance(fit, size[1])
            hessian = hessian_of(given, None) if given else None
            kind, form = "exact" if given is None else "hessian", StoredForm(BY_NAME[name])
            DeviceEncoder(backend).encode(weights, form, kind, hessian)
            encoder = DeviceEncoder(backend)  # one that has not begun to record launches
            marks.clear()
            backend.launch = timed  # type: ignore[method-assign]
            encoder.encode(weights, form, kind, hessian)
            backend.launch = launch  # type: ignore[method-assign]
            spent: dict[str, float] = defaultdict(float)
            for kernel, first, last in marks:
                spent[kernel] += 1e3 * backend.seconds_between(first, last)
            out[f"{name} {fit}"] = dict(spent)
            total = sum(spent.values())
            listed = "  ".join(f"{k} {v:.3f}" for k, v in sorted(spent.items(), key=lambda kv: -kv[1]))
            print(
                f"{name} {fit}: {total:.2f} ms, {weights.size / total / 1e6:.2f} G/s\n  {listed}", flush=True
            )
    return out


def layer_slice(device: Encoder, tier: dict[str, str], fit: str, jobs: int, passes: int, runs: int) -> float:
    """Weights/s of 16 experts, `passes` times over, from FP8 in memory to payloads, on `jobs` threads."""
    rng = np.random.default_rng(2)
    config = ModelConfig(2048, HIDDEN, 1, 48, 8, INTERMEDIATE, EXPERTS, 8, 128, 64, 5e6, 1e-6, 4096)
    widths = {"w1": HIDDEN, "w3": HIDDEN, "w2": INTERMEDIATE}
    diagonals = {p: np.exp(rng.normal(0, 1, (EXPERTS, k))) for p, k in widths.items()}
    counts = {p: np.full(EXPERTS, 1000.0) for p in widths}
    given = ImatrixLayer(0, diagonals, counts, ()) if fit == "hessian" else None
    formats = {p: BY_NAME[tier[p]] for p in widths}
    encoder = LayerEncoder(config, 0, given, formats, FitSettings(fit=cast(Any, fit), awq_alpha=0.0), device)
    encoder.prepare({})
    up = quantize((0.02 * rng.standard_t(5, (INTERMEDIATE, HIDDEN))).astype(np.float32))
    down = quantize((0.02 * rng.standard_t(5, (HIDDEN, INTERMEDIATE))).astype(np.float32))

    def expert(number: int) -> int:
        w1, w3, w2 = (dequantize(*codes) for codes in (up, up, down))
        done = encoder.encode_expert(number % EXPERTS, w1, w3, w2)
        return sum(payload.nbytes for payload in done.payloads.values())

    def work() -> None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(expert, range(EXPERTS * passes)))

    seconds = median(work, runs, time.perf_counter)
    return EXPERTS * passes * 3 * HIDDEN * INTERMEDIATE / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="The encoder on a GPU beside one core.")
    parser.add_argument(
        "--device", default="cuda", help="cuda, hip, or cpu: the kernels on the CPU, for a test"
    )
    parser.add_argument("--rows", type=int, default=HIDDEN)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="threads that ask")
    parser.add_argument("--streams", type=int, default=GPU_STREAMS, help="streams of the device")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--kernels", action="store_true", help="time every kernel instead")
    parser.add_argument("--no-slice", action="store_true")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    size = (args.rows, INTERMEDIATE)
    result: dict[str, Any] = {}
    if args.kernels:
        with open_backend(args.device) as backend:
            print(backend.device)
            result = {"device": backend.device, "milliseconds": kernel_times(backend, size, args.formats)}
    else:
        options = {} if args.device == "cpu" else {"own_stream": True}
        encoder = GpuEncoder(lambda: open_backend(args.device, **options), streams=args.streams)
        print(encoder.device)
        jobs = args.jobs
        result = {
            "device": encoder.device,
            "matrices": matrices(encoder, size, args.runs, args.formats, jobs),
        }
        tiers = {"mq2-lloyd": ("MQ2-Lloyd", "MQ4"), "mq3": ("MQ3-Lloyd", "MQ3-Lloyd"), "mq4": ("MQ4", "MQ4")}
        for tier, (up, down) in {} if args.no_slice else tiers.items():
            for fit in ("exact", "hessian"):
                chosen = {"w1": up, "w3": up, "w2": down}
                speed = layer_slice(encoder, chosen, fit, jobs, 4, 3)
                result.setdefault("slices", {})[f"{tier} {fit}"] = speed
                print(f"slice {tier} {fit}, {jobs} threads: {speed / 1e6:.0f} M weights/s", flush=True)
        encoder.close()
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
