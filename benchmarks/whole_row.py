"""What rounding whole rows costs at M2.7's width: seconds per matrix, and the share of matrix products in it.

    python benchmarks/whole_row.py                     # one core: one matrix of each kind; then 16 experts on all cores
    python benchmarks/whole_row.py --device cuda       # and the 16 experts with a GPU beside the cores

Gate and up share their layer's second moment, each expert's down matrix has its own. The first table is on the
thread's own CPU clock, and `products` is what later groups do about the errors of earlier ones; feedback and descent
inside a group are products too, of 256 columns, and not counted. The slice is 16 experts in wall-clock time, moments
and weights in memory, factors of down included. The extrapolation is 62 layers of 16 such slices and one factor of gate
and up; reading weights and moments, searching the AWQ exponent and writing are left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from mq_quant.awq.from_imatrix import ImatrixLayer
from mq_quant.awq.importance import Importance
from mq_quant.formats.blocks import BY_NAME, Format
from mq_quant.formats.fwht import rotate
from mq_quant.formats.minimax import ModelConfig
from mq_quant.lloyd.encode import encode_rotated
from mq_quant.lloyd.hessian.row import RowHessian, from_moment
from mq_quant.lloyd.simd.vec import LANES
from mq_quant.lloyd.whole_row import answer_errors
from mq_quant.quantize.encode.blas import one_blas_thread
from mq_quant.quantize.encode.encoders import DEVICES, Encoder, open_encoder
from mq_quant.quantize.encode.layer_encoder import LayerEncoder
from mq_quant.quantize.encode.prepared_layer import FitSettings

LAYERS, EXPERTS, SLICE = 62, 256, 16
HIDDEN, INTERMEDIATE = 3072, 1536
MATRICES = {"gate (up alike)": (1536, 3072, "MQ2-Lloyd"), "down": (3072, 1536, "MQ3-Lloyd")}


def timed(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def moment(columns: int, seed: int) -> np.ndarray:
    """E[x xᵀ] f64 [K, K] of correlated inputs."""
    basis = (
        np.random.default_rng(seed).standard_normal((columns, columns)) * np.arange(1, columns + 1) ** -0.5
    )
    out: np.ndarray = basis @ basis.T / columns
    return out


@dataclass(frozen=True)
class Moments(ImatrixLayer):
    """One layer whose moments are in memory."""

    gate_up: Importance
    down: tuple[Importance, ...]

    def of(self, expert: int, projection: str) -> Importance:
        return self.down[expert] if projection == "w2" else self.gate_up


def layer_slice(device: Encoder, jobs: int, runs: int) -> tuple[float, float]:
    """Median wall-clock seconds of 16 experts of mq2 on `jobs` threads, and of what their layer needs once."""
    rng = np.random.default_rng(1)
    config = ModelConfig(2048, HIDDEN, 1, 48, 8, INTERMEDIATE, SLICE, 8, 128, 64, 5e6, 1e-6, 4096)
    downs = tuple(Importance(np.ones(INTERMEDIATE), moment(INTERMEDIATE, e), 2000.0) for e in range(SLICE))
    gate_up = Importance(np.ones(HIDDEN), moment(HIDDEN, 99), 65536.0)
    given = Moments(0, {"w1": np.ones((SLICE, HIDDEN))}, {"w1": np.ones(SLICE)}, (), gate_up, downs)
    formats = {"w1": BY_NAME["MQ2-Lloyd"], "w3": BY_NAME["MQ2-Lloyd"], "w2": BY_NAME["MQ3-Lloyd"]}
    up = (0.02 * rng.standard_t(5, (INTERMEDIATE, HIDDEN))).astype(np.float32)
    down = (0.02 * rng.standard_t(5, (HIDDEN, INTERMEDIATE))).astype(np.float32)

    def work() -> tuple[float, float]:
        encoder = LayerEncoder(config, 0, given, formats, FitSettings(awq_alpha=0.0), device)
        began = time.perf_counter()
        encoder.prepare({})  # factors the Hessian that all experts share at gate and up
        once = time.perf_counter() - began
        encoder.encode_expert(0, up, up, down)
        began = time.perf_counter()
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda e: encoder.encode_expert(e, up, up, down), range(SLICE)))
        return time.perf_counter() - began, once

    work()
    seconds, once = zip(*(work() for _ in range(runs)), strict=True)
    return statistics.median(seconds), statistics.median(once)


def measure(rows: int, columns: int, fmt: Format) -> dict[str, float]:
    """Seconds of one core: rotating and factoring the moment, encoding one matrix, and the products inside that."""
    rng = np.random.default_rng(0)
    importance = Importance(np.ones(columns), moment(columns, 0), 1e5)
    weights = rotate(rng.standard_t(5, (rows, columns)).astype(np.float32))
    made: list[RowHessian] = []
    factor = timed(lambda: made.append(from_moment(importance.rotated_moment())))
    hessian = made[0]
    encode_rotated(weights[:16], fmt, "hessian", hessian)
    encode = timed(lambda: encode_rotated(weights, fmt, "hessian", hessian))
    errors = np.zeros((len(hessian.groups), -(-rows // LANES), 256, LANES), np.float32)
    targets = np.empty((rows, 256), np.float32)
    products = timed(
        lambda: [
            answer_errors(weights, 256 * g, errors, answer, targets)
            for g, answer in enumerate(hessian.answers)
        ]
    )
    return {"factor": factor, "encode": encode, "products": products}


@one_blas_thread()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=DEVICES, help="time the slice on this one too")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print("| matrix | format | factor (s) | encode (s) | of it products | million weights/s |")
    print("|---|---|---|---|---|---|")
    for name, (rows, columns, fmt) in MATRICES.items():
        t = measure(rows, columns, BY_NAME[fmt])
        speed, share = rows * columns / t["encode"] / 1e6, t["products"] / t["encode"]
        size = f"{rows} × {columns}"
        print(
            f"| {name} {size} | {fmt} | {t['factor']:.2f} | {t['encode']:.2f} | {share:.0%} | {speed:.1f} |",
            flush=True,
        )
    print(f"\n| {SLICE} experts of mq2 on | seconds | per matrix | whole model |")
    print("|---|---|---|---|")
    for device in dict.fromkeys(("cpu", args.device)):
        with open_encoder(device) as encoder:
            seconds, once = layer_slice(encoder, args.jobs, args.runs)
            where = f"{args.jobs} threads" + ("" if device == "cpu" else f", {encoder.device}")
        whole = LAYERS * (seconds * EXPERTS / SLICE + once) / 3600
        print(f"| {where} | {seconds:.2f} | {seconds / SLICE / 3:.3f} | {whole:.2f} h |", flush=True)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
