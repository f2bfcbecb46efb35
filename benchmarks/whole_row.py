"""What rounding whole rows costs at M2.7's width: seconds per matrix, and the share of matrix products in it.

    python benchmarks/whole_row.py

One expert's gate matrix under the layer's shared second moment, and its down matrix under its own. Times are of the
thread's own CPU clock. The extrapolation to the whole model is arithmetic on these numbers: 62 layers × 256 experts,
factors of gate/up once per layer and of down once per expert, on 16 cores that are each as fast as this one.
Depends on the installed mq_quant.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import numpy as np
from mq_quant.awq.importance import Importance
from mq_quant.formats.blocks import BY_NAME, Format
from mq_quant.formats.fwht import rotate
from mq_quant.lloyd import whole_row
from mq_quant.lloyd.encode import encode_rotated

LAYERS, EXPERTS, CORES = 62, 256, 16
MATRICES = {"gate (up alike)": (1536, 3072, "MQ2-Lloyd"), "down": (3072, 1536, "MQ3-Lloyd")}


def timed(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(rows: int, columns: int, fmt: Format) -> dict[str, float]:
    """Seconds of one core: rotating and factoring the moment, encoding one matrix, and the products inside that."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((columns, columns)) * np.arange(1, columns + 1) ** -0.5
    importance = Importance(np.ones(columns), basis @ basis.T / columns, 1e5)
    weights = rotate(rng.standard_t(5, (rows, columns)).astype(np.float32))
    made: list[whole_row.RowHessian] = []
    factor = timed(lambda: made.append(whole_row.from_moment(importance.rotated_moment())))
    hessian = made[0]
    encode_rotated(weights[:16], fmt, "hessian", hessian)
    encode = timed(lambda: encode_rotated(weights, fmt, "hessian", hessian))
    errors = weights[:, :256].copy()
    products = timed(
        lambda: [
            whole_row.compensate(weights, g, errors, hessian.answers) for g in range(len(hessian.groups))
        ]
    )
    return {"factor": factor, "encode": encode, "products": products}


def main() -> None:
    print("| matrix | format | factor (s) | encode (s) | of it products | million weights/s |")
    print("|---|---|---|---|---|---|")
    total = 0.0
    for name, (rows, columns, fmt) in MATRICES.items():
        t = measure(rows, columns, BY_NAME[fmt])
        speed = rows * columns / t["encode"] / 1e6
        share = t["products"] / t["encode"]
        print(
            f"| {name} {rows} × {columns} | {fmt} | {t['factor']:.2f} | {t['encode']:.2f} | {share:.0%} | {speed:.1f} |"
        )
        down = name == "down"
        total += LAYERS * (
            t["factor"] * (EXPERTS if down else 1) + EXPERTS * (1 if down else 2) * t["encode"]
        )
    print(
        f"\nwhole model, mq2: {total / 3600:.1f} core hours, {total / 3600 / CORES:.1f} h on {CORES} such cores"
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
